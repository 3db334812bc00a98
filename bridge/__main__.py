"""`python -m bridge`."""

import sys

from bridge.errors import BridgeError

try:
    from bridge.cli import main
except BridgeError as error:
    # What the environment asks for while modules are loaded (failpoints) may be wrong as well.
    sys.stderr.write(f"{error}\n")
    sys.exit(error.exit_code)

if __name__ == "__main__":
    sys.exit(main())
