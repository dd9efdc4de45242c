"""Submits a training run to SLURM as a job that runs in chunks of limited time: fills in
slurm_template.sh, which you may edit for your cluster, and passes the result to sbatch.

python scripts/slurm_submit.py --time 3 --gpus_per_node 4 --chunks 8 -- FLAGS OF TrainIMLE.py"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import _path  # noqa: F401 (makes the modules importable)

from internals.processes import run_command
from IO import (
    Parser,
    check_processes,
    probe_paths,
    real,
    resolve_flags,
    training_parser,
    whole,
    with_config,
)
from Utils import InputError

ROOT = Path(__file__).resolve().parent.parent

TEMPLATE = Path(__file__).with_name("slurm_template.sh")
STAGED = '"${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/imle-ssl-$SLURM_JOB_ID"'  # the node's own storage


def submit_parser():
    """The parser of this script's own flags, before `--`."""
    parser = Parser(
        prog="slurm_submit.py",
        usage="slurm_submit.py --time HOURS [flags] -- FLAGS OF TrainIMLE.py",
        description=__doc__.split("\n\n")[0],
    )
    add = parser.add_argument
    # fmt: off
    add("--time", type=real(1 / 60), required=True, metavar="HOURS", help="time limit of one chunk")
    add("--chunks", type=whole(1), default=1, metavar="N", help="the job runs at most N times")
    add("--stop_before", type=whole(1, 65535), default=300, metavar="SECONDS",
        help="SLURM asks the run to save and end so long before the time limit")
    add("--nodes", type=whole(1), default=1, metavar="N", help="number of nodes")
    add("--gpus_per_node", type=whole(0), default=1, metavar="N",
        help="GPUs per node, with one process per GPU; 0: one process per node, on CPUs")
    add("--cpus_per_task", type=whole(1), default=8, metavar="N", help="cores per process")
    add("--mem", metavar="SIZE", help="memory per node, such as 64G; default: the cluster's")
    add("--account", metavar="NAME", help="account to charge; default: yours")
    add("--partition", metavar="NAME", help="partition to run in; default: the cluster's")
    add("--sbatch", nargs="+", default=[], metavar="NAME=VALUE",
        help="other sbatch options, without dashes, such as constraint=a100 exclusive")
    add("--stage", action="store_true",
        help="first copy the data to each node's own storage: $SLURM_TMPDIR, $TMPDIR or /tmp")
    add("--dry_run", action="store_true", help="print the batch script; do not submit it")
    # fmt: on
    return parser


def main(argv=None):
    """Submits the job that the command line describes, or prints it with --dry_run."""
    argv = sys.argv[1:] if argv is None else argv
    parser = submit_parser()
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    training = with_config(argv[cut + 1 :])  # the job keeps the values that the file has now
    if not training:
        parser.error("the flags of TrainIMLE.py are missing; write them behind `--`")
    run_command(lambda: run(args, training))


def run(args, training):
    """Checks the flags of both programs, then submits or prints the job."""
    if args.stop_before >= 3600 * args.time:
        raise InputError(f"--stop_before {args.stop_before}: must be less than --time")
    tasks_per_node = max(1, args.gpus_per_node)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the batch script alone
        given, flags = check_training(training, args.gpus_per_node, args.nodes * tasks_per_node)
    if flags.wandb == "online":
        print("note: --wandb offline, as nodes seldom have internet access", file=sys.stderr)
        training = [*training, "--wandb", "offline"]
    command = in_lines([sys.executable, str(ROOT / "TrainIMLE.py"), *training])
    script = fill(
        TEMPLATE.read_text(),
        job_name=shlex.quote(flags.suffix or "imle-ssl"),
        time=hours_minutes_seconds(args.time),
        nodes=args.nodes,
        tasks_per_node=tasks_per_node,
        cpus_per_task=args.cpus_per_task,
        stop_before=args.stop_before,
        more_options=more_options(args),
        chunks=args.chunks,
        staged=STAGED if args.stage else "",
        data=shlex.join(data_paths(flags)) if args.stage else "",
        training=command + (' \\\n        --staged "$staged"' if args.stage else ""),
        uid=given.uid or "$SLURM_JOB_ID",
    )
    print(script, end="") if args.dry_run else submit(script, flags.save_folder)


def check_training(training, gpus_per_node, n_tasks):
    """The training's flags, as given and resolved. Raises InputError for flags unfit for chunks."""
    if "--resume" in {word.split("=")[0] for word in training}:
        raise InputError("--resume: every chunk would restart from it; give --uid instead")
    given = training_parser().parse_args(training)
    if given.gpus not in (None, ["cpu"]):
        raise InputError("--gpus: leave it out; srun starts one process per GPU")
    if given.gpus and gpus_per_node:
        raise InputError(f"--gpus cpu: needs --gpus_per_node 0, is {gpus_per_node}")
    flags = resolve_flags(given)
    check_processes(flags, n_tasks)
    return given, flags


def data_paths(flags):
    """The data's absolute paths; TrainIMLE.py looks for the same paths below --staged."""
    paths = [flags.data_tr, flags.data_val]
    paths += [path for pair in probe_paths(flags.probe_data).values() for path in pair]
    paths = [os.path.abspath(Path(path).expanduser()) for path in paths]
    for path in paths:
        if not os.path.exists(path):
            raise InputError(f"--stage: {path} does not exist")
    return list(dict.fromkeys(paths))


def hours_minutes_seconds(hours):
    """Formats hours for sbatch: H:MM:SS."""
    minutes, seconds = divmod(round(3600 * hours), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def more_options(args):
    """The #SBATCH lines for options that the template does not have."""
    options = {
        "gpus-per-node": args.gpus_per_node or None,
        "mem": args.mem,
        "account": args.account,
        "partition": args.partition,
    }
    words = [f"{name}={value}" for name, value in options.items() if value is not None]
    return "\n".join(f"#SBATCH --{word}" for word in words + args.sbatch)


def in_lines(words):
    """A shell command of these words, with a new line for each flag."""
    breaks = [" \\\n        " if word.startswith("--") else " " for word in words]
    return "".join(map("{}{}".format, breaks, map(shlex.quote, words))).strip()


def fill(template, **values):
    """The template with each {{WORD}} replaced. Raises InputError for a word without a value."""

    def value(match):
        if match[1].lower() not in values:
            raise InputError(f"{TEMPLATE}: {match[0]} has no value")
        return str(values[match[1].lower()])

    return re.sub(r"{{(\w+)}}", value, template)


def submit(script, save_folder):
    """Submits the script by sbatch; prints where the job's output and run will be."""
    if shutil.which("sbatch") is None:
        raise InputError("sbatch is not installed here; --dry_run prints the batch script")
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"sbatch: {done.stderr.strip().splitlines()[-1]}")
    job = done.stdout.split(";")[0].strip()
    print(f"job {job}; its output: {os.path.abspath(f'slurm-{job}.out')}")
    print(f"its run: {os.path.abspath(os.path.expanduser(save_folder))}/models/")


if __name__ == "__main__":
    main()
