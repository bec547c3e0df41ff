"""S3 whose credentials may change while a run goes on: the one place that reads them anew.

s3fs keeps one file system for a process and in it one client, whose credentials are those that botocore found when it
was made. Those of an instance role renew themselves; those of the environment and of the shared credentials file do
not.
"""

from __future__ import annotations

import asyncio
from typing import Any

import s3fs
from fsspec.asyn import sync_wrapper

from pd_core.core.errors import CredentialsRefused

# What stores say of credentials that were good once and are not any more: the session has expired, or the key is gone.
EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
UNKNOWN = frozenset({"InvalidAccessKeyId", "InvalidToken", "InvalidTokenId"})  # the last: MinIO
_BARE = frozenset({"400", "403"})  # HEAD has no body to say why


class S3FileSystem(s3fs.S3FileSystem):
    """s3fs that repeats a request once, with credentials read anew, where the store refuses those it had.

    Every operation of s3fs comes down to `_call_s3`, in the one event loop of a process, whichever thread asked for it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._renewing = asyncio.Lock()

    async def _call_s3(self, method: str, *more: Any, **arguments: Any) -> Any:
        client = await self.set_session()
        try:
            return await self._answer(method, *more, **arguments)
        except OSError as error:
            # a bare answer whose reason was asked for with the credentials that another request has read meanwhile
            overtaken = self._s3 is not client and _code(error) in _BARE
            if not (_refusal(error) or overtaken):
                raise
        await self._renew(client)
        try:
            return await self._answer(method, *more, **arguments)
        except OSError as error:
            if code := _refusal(error):
                raise CredentialsRefused(f"{code}: {error}", _uri(**arguments)) from error
            raise

    # s3fs binds its own `_call_s3` into this one
    call_s3 = sync_wrapper(_call_s3)

    async def _answer(self, method: str, *more: Any, **arguments: Any) -> Any:
        try:
            return await super()._call_s3(method, *more, **arguments)
        except OSError as error:
            if method != "head_object" or _code(error) not in _BARE:
                raise
            bare = error
        try:
            response = await super()._call_s3("get_object", *more, **arguments, Range="bytes=0-0")
        except OSError as error:
            if _refusal(error):
                raise
        else:
            response["Body"].close()
        raise bare

    async def _renew(self, refused: Any) -> None:
        """A new client, unless another request that was refused has made one meanwhile."""
        async with self._renewing:
            if self._s3 is refused:
                await self.set_session(refresh=True)


def _uri(Bucket: str = "", Key: str = "", Prefix: str = "", **_: Any) -> str:
    return f"s3://{Bucket}/{Key or Prefix}"


def _code(error: OSError) -> str:
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _refusal(error: OSError) -> str:
    """The store's error code if it is of the credentials, else nothing."""
    code = _code(error)
    return code if code in EXPIRED | UNKNOWN else ""
