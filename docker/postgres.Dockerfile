# PostgreSQL with wal2json; the base image already knows the package source that has it.
FROM postgres:17
RUN apt-get update \
    && apt-get install --yes --no-install-recommends postgresql-17-wal2json \
    && rm -rf /var/lib/apt/lists/*
COPY docker/initdb/ /docker-entrypoint-initdb.d/
