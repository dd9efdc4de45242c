"""Prints docs/faults.md, of the names of the tests in tests/test_faults.py."""

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests/test_faults.py"
HEAD = """# Faults and what becomes of a run

Each row is a test of tests/test_faults.py, which injects the fault, into the real command where
that can be, and checks the outcome. `python scripts/fault_table.py > docs/faults.md` makes this
page of their names.

| fault | outcome |
|---|---|"""


def main():
    """Prints the table."""
    print(HEAD)
    for node in ast.parse(TESTS.read_text()).body:
        name = getattr(node, "name", "")
        if name.startswith("test_") and "__" in name:
            fault, outcome = name.removeprefix("test_").replace("_", " ").split("  ")
            print(f"| {fault} | {outcome} |")


if __name__ == "__main__":
    main()
