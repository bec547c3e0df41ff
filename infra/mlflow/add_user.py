"""Add a user to the MLflow server beside this process: its password on standard input, so that no command line has it.

printf %s "$PASSWORD" | kubectl --namespace pd-core exec --stdin deployment/mlflow --
    python /opt/mlflow/add_user.py pd-core
"""

from __future__ import annotations

import os
import sys


def main(name: str) -> None:
    """Create the user with the administrator's rights of this environment; a user that exists gets the new password."""
    from mlflow.exceptions import MlflowException
    from mlflow.server import get_app_client

    for here, there in (("USERNAME", "ADMIN_USERNAME"), ("PASSWORD", "ADMIN_PASSWORD")):
        os.environ[f"MLFLOW_TRACKING_{here}"] = os.environ[f"MLFLOW_AUTH_{there}"]
    client = get_app_client("basic-auth", tracking_uri=f"http://127.0.0.1:{os.environ.get('PORT', '5000')}")
    password = sys.stdin.read().rstrip("\n")
    try:
        client.create_user(name, password)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise SystemExit(f"error: user {name}: {error}") from None
        client.update_user_password(name, password)
    print(f"user {name} can log in")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: add_user.py NAME, with the password on standard input")
    main(sys.argv[1])
