"""What is written to PostgreSQL: tables, and the transactions that fill them. Pure."""

from __future__ import annotations

from typing import NamedTuple

SETTLE = ("VACUUM (ANALYZE)", "CHECKPOINT")


class Workload(NamedTuple):
    """`setup` makes the tables, `load` writes the rows."""

    setup: list[str]
    load: str
    rows: int

    @property
    def settled(self) -> list[str]:
        """What leaves its tables as those of a database that has been in use for a while: filled, vacuumed, analysed
        and written to disk."""
        return [*self.setup, self.load, *SETTLE]


def messages(rows: int, per: int) -> Workload:
    """Rows of about 700 bytes and 8 columns, `per` to a transaction."""
    return _filled(
        "messages",
        "id bigint PRIMARY KEY, list_id int NOT NULL, author text NOT NULL, subject text NOT NULL, body text NOT NULL, "
        "posted_at timestamptz NOT NULL, score numeric(10,2), spam bool NOT NULL",
        "n % 100, 'author ' || n % 1000, 'Re: subject number ' || n, "
        "repeat('Some words of a message that people wrote. ', 12), now(), n % 1000 / 7.0, n % 50 = 0",
        rows,
        per,
    )


def narrow(rows: int, per: int) -> Workload:
    """Rows of three columns."""
    columns = "id bigint PRIMARY KEY, list_id int NOT NULL, subject text NOT NULL"
    return _filled("narrow", columns, "n % 100, 'Re: subject number ' || n", rows, per)


def wide(rows: int, per: int) -> Workload:
    """Rows of thirty columns and about 4 KB."""
    numbers = [f"n % {divisor}" for divisor in range(11, 20)]
    texts = [f"'column {column}: ' || repeat('words that people wrote ', 8) || n" for column in range(18)]
    columns = [
        "id bigint PRIMARY KEY",
        *(f"number{n} int NOT NULL" for n in range(len(numbers))),
        *(f"text{n} text NOT NULL" for n in range(len(texts))),
        "posted_at timestamptz NOT NULL",
        "score numeric(10,2)",
    ]
    return _filled("wide", ", ".join(columns), ", ".join([*numbers, *texts, "now()", "n % 1000 / 7.0"]), rows, per)


def _filled(table: str, columns: str, values: str, rows: int, per: int) -> Workload:
    rows = max(rows // per, 1) * per
    load = f"""
    CREATE PROCEDURE load(total int, per int) LANGUAGE plpgsql AS $$
    BEGIN
        FOR chunk IN 0 .. total / per - 1 LOOP
            INSERT INTO {table} SELECT chunk * per + n, {values} FROM generate_series(1, per) n;
            COMMIT;
        END LOOP;
    END $$
    """
    return Workload([f"CREATE TABLE {table} ({columns})", load], f"CALL load({rows}, {per})", rows)


def tables(count: int, rows: int, per: int = 20) -> Workload:
    """Short rows spread over `count` tables, every row of a transaction in another one; the first `count` rows meet
    each table once, and what is measured begins behind them."""
    rows = max(rows, 20 * count) // per * per
    make = f"""
    DO $$ BEGIN FOR n IN 0 .. {count - 1} LOOP
        EXECUTE format('CREATE TABLE t%s (id bigint PRIMARY KEY, list_id int NOT NULL, subject text NOT NULL,
                        posted_at timestamptz NOT NULL)', n);
    END LOOP; END $$
    """
    load = f"""
    CREATE PROCEDURE load(total int, per int) LANGUAGE plpgsql AS $$
    BEGIN
        FOR n IN 0 .. total - 1 LOOP
            EXECUTE format('INSERT INTO t%s VALUES ($1, $1 %% 100, ''Re: subject number '' || $1, now())',
                           n % {count}) USING n;
            IF n % per = per - 1 THEN COMMIT; END IF;
        END LOOP;
    END $$
    """
    return Workload([make, load], f"CALL load({rows}, {per})", rows)


TICKS = (
    "CREATE TABLE ticks (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, author text NOT NULL, body text NOT NULL, "
    "posted_at timestamptz NOT NULL)"
)
TICK = (
    "INSERT INTO ticks (author, body, posted_at) VALUES ('author', "
    "repeat('Some words of a message that people wrote. ', 12), clock_timestamp());"
)
