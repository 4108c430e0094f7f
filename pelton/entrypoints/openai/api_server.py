"""`python -m pelton.entrypoints.openai.api_server --model MODEL`: the same as `pelton serve MODEL`."""

from __future__ import annotations

import sys

from pelton.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
