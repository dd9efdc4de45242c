"""Prints docs/faults.md: one row per test of tests/test_faults.py, made from the test's name."""

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests/test_faults.py"
HEAD = """# Faults and what becomes of a run

Each row is a test of tests/test_faults.py. The test injects the fault, mostly into the real
command, and checks the outcome. `python scripts/fault_table.py > docs/faults.md` writes this page
from the names of the tests.

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
