"""Compares the speed of several candidates: python scripts/benchmark.py WHAT [flags].
`benchmark.py WHAT --help` lists the flags of one benchmark."""

import json
import sys

import _path  # noqa: F401 (makes the modules importable)
from benchmarks import data, frontier, probe, sampling, train

from internals.processes import run_command
from IO import Parser
from Utils import write_atomically

# Each benchmark has add_flags(parser) and measure(args), which yields Tables.
BENCHMARKS = {
    "data": data,
    "sampling": sampling,
    "frontier": frontier,
    "train": train,
    "probe": probe,
}


def print_table(table):
    """Prints a Table: its title, a row per candidate, its notes."""
    lines = [[heading for heading, _ in table.columns.values()]]
    for row in table.rows:
        lines.append(
            [
                "-" if row.get(key) is None else form.format(row[key])
                for key, (_, form) in table.columns.items()
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{table.title}")
    for first, *cells in lines:
        print(first.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), sep="  ")
    for note in table.notes:
        print(note)
    sys.stdout.flush()


def main(argv=None):
    """The command benchmark.py: runs one benchmark, prints its tables, writes their rows."""
    parser = Parser(prog="benchmark.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="WHAT", dest="what")
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, description=module.__doc__, help=module.__doc__)
        command.add_argument("--json", metavar="FILE", help="write the rows of all tables to FILE")
        module.add_flags(command)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")

    def measure():
        rows = []
        for table in BENCHMARKS[args.what].measure(args):
            print_table(table)
            rows += table.rows
        if args.json:
            write_atomically(args.json, json.dumps(rows, indent=1).encode())

    run_command(measure)


if __name__ == "__main__":
    main()
