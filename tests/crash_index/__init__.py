"""Kill, stop and cut everything around search indexes at random under load, and compare each index with its table.

`make crash WHAT=index SEEDS=n` runs n scenarios. A seed chooses the search engine, one or two tables and their shapes
(`exclude`, `rename`, a transform), the log's mode, whether a second reader stands by, where it begins (with the first
build, at a failpoint of it, behind it), rebuilds with and without --keep-old, and one to six faults, one after another
or two at a time on different parts. Then all are waited for until they are in step, and oracle.py compares every id and
every value of each generation that is followed with what PostgreSQL holds; there must be no dead letter that was not
planned, no index or consumer that the record does not name, no reader or rebuild that ended by itself. Half of the
seeds then rebuild an index and compare again. ENGINE=osmem is an engine in memory: many seeds in the same time, without
a kill of the engine.

| part       | fault             | what happens |
|------------|-------------------|--------------|
| reader     | kill_reader       | SIGKILL at any moment, and a start soon after |
|            | end_reader        | SIGTERM must end it with 0, and a start soon after |
|            | pause_reader      | SIGSTOP, SIGCONT up to 14 s later: past its lease it wakes up as a zombie |
|            | kill_and_send_late | SIGKILL; what it had sent to the engine arrives when its successor is at work |
|            | kill_reader_at_failpoint | SIGKILL to itself at a line of bridge/failpoints.py |
|            | stop_reader_at_failpoint | SIGSTOP there, SIGCONT up to 14 s later |
|            | cut_reader_at_failpoint  | all its connections break there |
| rebuild    | reindex           | a rebuild, undisturbed |
|            | kill_reindex      | SIGKILL at any moment; then another one, or not |
|            | kill_reindex_at_failpoint | SIGKILL to itself at a line of bridge/failpoints.py |
|            | stop_reindex_at_failpoint | SIGSTOP there, SIGCONT up to 11 s later, at times behind another one |
|            | cut_reindex_at_failpoint  | all its connections break there |
| bridge     | kill_bridge, end_bridge | SIGKILL or SIGTERM, and a start soon after |
| engine     | kill_engine, restart_engine | SIGKILL or an orderly stop of the node, and a start on the same data |
|            | pause_engine      | SIGSTOP for up to 12 s |
| broker     | kill_broker, restart_broker | SIGKILL or an orderly stop, and a start on the same data |
|            | pause_broker      | SIGSTOP for up to 7 s |
| network    | cut, refuse, hold, delay, strand | as in tests/crash, between a reader (or the rebuilds) and a server |
| consumer   | delete_consumer   | a durable consumer is deleted behind its reader's back |
|            | steal             | somebody else pulls from it, and may ack |
|            | reset_consumer    | somebody sets it back or ahead |
"""
