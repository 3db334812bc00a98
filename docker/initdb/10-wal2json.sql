-- From some minor releases on PostgreSQL loads only listed output plugins. A server that does not know the setting
-- refuses to start with it in its configuration, so ask first. Runs once, when the volume is new: after an upgrade of
-- an existing one the bridge says at its start whether this statement is needed.
SELECT count(*) > 0 AS listed FROM pg_settings WHERE name = 'output_plugin_libraries' \gset
\if :listed
ALTER SYSTEM SET output_plugin_libraries = pgoutput, test_decoding, wal2json;
\endif
