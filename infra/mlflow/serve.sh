#!/bin/sh
# The one way the server is started: with authentication. From the environment: PGPASSWORD, MLFLOW_AUTH_ADMIN_USERNAME,
# MLFLOW_AUTH_ADMIN_PASSWORD, MLFLOW_FLASK_SERVER_SECRET_KEY (signs the forms; the same for all processes), ARTIFACTS (s3://bucket/prefix),
# ALLOWED_HOSTS (names by which clients call the server; MLflow answers to no other), and what S3 needs.
set -eu
exec mlflow server --app-name basic-auth \
  --host "${BIND:-0.0.0.0}" --port "${PORT:-5000}" --workers 2 \
  --backend-store-uri "${BACKEND:-postgresql+psycopg2://mlflow@postgres:5432/mlflow}" \
  --serve-artifacts --artifacts-destination "${ARTIFACTS:?a prefix such as s3://my-bucket/mlflow}" \
  --allowed-hosts "${ALLOWED_HOSTS:?names that clients call the server by, comma-separated}"
