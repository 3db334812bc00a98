FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE nats-server.conf ./
COPY bridge/ bridge/
RUN python -m venv /opt/bridge && /opt/bridge/bin/pip install --no-cache-dir '.[embedded]'

FROM python:3.13-slim
COPY --from=build /opt/bridge /opt/bridge
# /data is the place for the embedded nats-server's store_dir; it belongs to the user, so that a volume does too.
RUN useradd --system --no-create-home bridge && install -d -o bridge -g bridge /data
ENV PATH=/opt/bridge/bin:$PATH PYTHONUNBUFFERED=1
USER bridge
WORKDIR /data
# The broker answers and the stream is there; for the bridge and an index reader alike.
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m --retries=3 CMD bridge replay --limit 1 >/dev/null
ENTRYPOINT ["bridge"]
CMD ["run"]
