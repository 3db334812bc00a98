"""Alter a table at random between its changes, and compare each event with the row and the catalogue of its moment.

`make crash WHAT=altering SEEDS=n` runs n scenarios. A seed chooses the table (plain, or partitioned with a partition
whose columns have other places; its replica identity the key or the whole row; a column excluded or not), whether
savepoints are set, and whether the bridge runs while it is altered. Then one writer commits transactions of DDL and
DML in any order, and rolls some back in part or whole, while the bridge is stopped, once or twice, or also while it
runs. Whatever he commits he notes: each change with the row before and after, and the columns and the key of then.

| statement | what happens |
|-----------|--------------|
| add       | a column of any of a dozen types, with a default or without |
| drop      | a column |
| rename    | a column gets a name that is free, maybe that of one that was dropped |
| swap      | two columns take each other's name |
| retype    | a column gets another type, or the same one once more, and other values |
| rename the key | its column has another name |
| secret    | the column that may be excluded is dropped, or made again with a default |
| insert, update, delete | of rows in all partitions; values that are large enough to be left out of an update |
| truncate  | of the table, or of a partition |

Once what must be read again has been, the events must be the changes, in order, each with its operation, its key, its
values, the old ones where they belong, nothing left out but large values that are there, behind a `schema` event of
its columns and key; no message has a byte of the excluded column; and what the log gives when it is replayed is the
table (tests/oracle.py).

Of a table with an excluded column the log may lack values that may be that one's (docs/privacy.md; each is counted as
`withheld`): then the table is read again before the log is replayed. Where a column came and the excluded one went the
bridge may refuse to go on, or to read it again (`contradiction`): then what the log has until there is compared.
"""
