# The service:      docker build --tag demopy .
# The sample data:  docker build --tag demopy-sample-data --target sample-data .
#
# A tag moves; a digest does not: --build-arg PYTHON_IMAGE=python:3.13-slim@sha256:… pins the base for good.
ARG PYTHON_IMAGE=python:3.13-slim
# what micro_svc_demo.py says
ARG VERSION=1.0.0

# ── What both images are made of ──────────────────────────────────────────────────────────────────────────────────────
FROM ${PYTHON_IMAGE} AS base
WORKDIR /app
# Bytecode is made once, at build: the root file system may be read-only.
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/app/packages

# ── Packages: wheels only, so no compiler; each with a hash of the lock ───────────────────────────────────────────────
FROM base AS packages
COPY .requirements.lock ./
RUN ["python", "-m", "pip", "install", "--no-cache-dir", "--no-compile", "--disable-pip-version-check", \
     "--root-user-action=ignore", "--require-hashes", "--only-binary", ":all:", "--target", "packages", \
     "--requirement", ".requirements.lock"]
COPY micro_svc_demo.py ./
# Not checked against the sources' times: those are what differs between two builds of the same sources.
RUN ["python", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "packages", "micro_svc_demo.py"]

FROM base AS sample-data-packages
COPY .requirements-sample-data.lock ./
RUN ["python", "-m", "pip", "install", "--no-cache-dir", "--no-compile", "--disable-pip-version-check", \
     "--root-user-action=ignore", "--require-hashes", "--only-binary", ":all:", "--target", "packages", \
     "--requirement", ".requirements-sample-data.lock"]
COPY micro_svc_demo.py ./
COPY tests/__init__.py tests/sample_data.py tests/
RUN ["python", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "packages", "micro_svc_demo.py", "tests"]

# ── The sample data: schema and generated profiles, for a Job ─────────────────────────────────────────────────────────
FROM base AS sample-data
ARG VERSION
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="demopy-sample-data" \
      org.opencontainers.image.description="Creates the schema and generated profiles of micro_svc_demo in Couchbase" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
COPY --from=sample-data-packages /app /app
USER 10001:10001
CMD ["python", "-m", "tests.sample_data"]

# ── The service: last, so that a plain `docker build .` makes it ──────────────────────────────────────────────────────
FROM base AS service
ARG VERSION
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="demopy" \
      org.opencontainers.image.description="A user-profile microservice: HTTP in front of Couchbase" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
COPY --from=packages /app /app
# A number, as Kubernetes can only tell of a number that it isn't root.
USER 10001:10001
# The API; and metrics with the probes, which is not for the public.
EXPOSE 8080 9090
# -I: nothing but the standard library, and no setting of Python's, decides about health. It speaks TLS where the API does,
# and trusts its own process; where clients need a certificate, it asks the metrics port.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-I", "-c", "import http.client as http, os, ssl, sys; get = os.environ.get; mutual = get('SERVICE_TLS_CLIENT_CA'); port = get('METRICS_PORT') or 9090 if mutual else get('SERVICE_PORT') or 8080; where = {'host': '127.0.0.1', 'port': int(port), 'timeout': 2}; connection = http.HTTPSConnection(**where, context=ssl._create_unverified_context()) if get('SERVICE_TLS_CERT') and not mutual else http.HTTPConnection(**where); connection.request('GET', '/healthz'); sys.exit(connection.getresponse().status != 200)"]
# No shell in between: SIGTERM reaches Python. As a module it is run from its bytecode.
CMD ["python", "-m", "micro_svc_demo"]
