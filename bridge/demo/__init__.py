"""`bridge demo`: everything on throwaway servers, with real text and the real commands.

archive.py   the text archive: docstrings of the standard library as messages posted to lists; its tables
children.py  bridge.toml, and the bridge's own commands as child processes
writer.py    posts, edits, deletes for as long as the show runs
searcher.py  searches without a pause; how long a commit takes to be found
watch.py     what bridge and index have got through, from their public state
compare.py   table and index, row by row
board.py     what is known at this moment; screen.py shows it, on a terminal or as plain lines
show.py      the order of events
"""

from bridge.demo.show import demo

__all__ = ["demo"]
