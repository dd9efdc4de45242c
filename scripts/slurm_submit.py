"""Submits a training run to SLURM, which goes on in chunks of a limited time: fills
slurm_template.sh, which is there to be edited for a cluster, and hands it to sbatch.

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
from IO import Parser, check_processes, real, resolve_flags, training_parser, whole
from Utils import InputError

ROOT = Path(__file__).resolve().parent.parent

TEMPLATE = Path(__file__).with_name("slurm_template.sh")
STAGED = '"${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/imle-ssl-$SLURM_JOB_ID"'  # node-local, of this job


def submit_parser():
    """The parser of this script's own flags, which stand in front of `--`."""
    parser = Parser(
        prog="slurm_submit.py",
        usage="slurm_submit.py --time HOURS [flags] -- FLAGS OF TrainIMLE.py",
        description=__doc__.split("\n\n")[0],
    )
    add = parser.add_argument
    # fmt: off
    add("--time", type=real(1 / 60), required=True, metavar="HOURS", help="limit of one chunk")
    add("--chunks", type=whole(1), default=1, metavar="N", help="runs of the job, at most")
    add("--stop_before", type=whole(1, 65535), default=300, metavar="SECONDS",
        help="before the limit, when the run is asked to save and end")
    add("--nodes", type=whole(1), default=1, metavar="N", help="nodes")
    add("--gpus_per_node", type=whole(0), default=1, metavar="N",
        help="GPUs of each node, one process each; 0: one process per node, on its CPUs")
    add("--cpus_per_task", type=whole(1), default=8, metavar="N", help="cores of each process")
    add("--mem", metavar="SIZE", help="memory of each node, as 64G; default: the cluster's")
    add("--account", metavar="NAME", help="that pays; default: yours")
    add("--partition", metavar="NAME", help="default: the cluster's")
    add("--sbatch", nargs="+", default=[], metavar="NAME=VALUE",
        help="more of sbatch's options, without their dashes, as constraint=a100 exclusive")
    add("--stage", action="store_true",
        help="copy the data to each node's own storage first: $SLURM_TMPDIR, $TMPDIR or /tmp")
    add("--dry_run", action="store_true", help="print the batch script, submit nothing")
    # fmt: on
    return parser


def main(argv=None):
    """Submits, or with --dry_run prints, the job that the command line describes."""
    argv = sys.argv[1:] if argv is None else argv
    parser = submit_parser()
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    training = argv[cut + 1 :]
    if not training:
        parser.error("the flags of TrainIMLE.py are missing; they stand behind `--`")
    run_command(lambda: run(args, training))


def run(args, training):
    """Checks both halves of the command line, then submits or prints."""
    if args.stop_before >= 3600 * args.time:
        raise InputError(f"--stop_before {args.stop_before}: must be shorter than --time")
    tasks_per_node = max(1, args.gpus_per_node)
    with contextlib.redirect_stdout(sys.stderr):  # notes: the script is what goes to stdout
        given, flags = check_training(training, args.gpus_per_node, args.nodes * tasks_per_node)
    if flags.wandb == "online":
        print("note: --wandb offline, as nodes seldom have a network", file=sys.stderr)
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
    """The training's flags, as given and resolved; an InputError for what can't go on by itself."""
    if "--resume" in {word.split("=")[0] for word in training}:
        raise InputError("--resume: a chunk could not go on from it; give that run's flags and uid")
    given = training_parser().parse_args(training)
    if given.gpus not in (None, ["cpu"]):
        raise InputError("--gpus: leave it out, srun starts a process per GPU")
    if given.gpus and gpus_per_node:
        raise InputError(f"--gpus cpu: needs --gpus_per_node 0, is {gpus_per_node}")
    flags = resolve_flags(given)
    check_processes(flags.mini_bs, n_tasks)
    return given, flags


def data_paths(flags):
    """The data's absolute paths, as TrainIMLE.py looks for them below --staged."""
    paths = [os.path.abspath(Path(path).expanduser()) for path in (flags.data_tr, flags.data_val)]
    for path in paths:
        if not os.path.exists(path):
            raise InputError(f"--stage: {path} does not exist")
    return list(dict.fromkeys(paths))


def hours_minutes_seconds(hours):
    """Hours as sbatch takes a time."""
    minutes, seconds = divmod(round(3600 * hours), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def more_options(args):
    """The lines of sbatch's options that are not in the template."""
    options = {
        "gpus-per-node": args.gpus_per_node or None,
        "mem": args.mem,
        "account": args.account,
        "partition": args.partition,
    }
    words = [f"{name}={value}" for name, value in options.items() if value is not None]
    return "\n".join(f"#SBATCH --{word}" for word in words + args.sbatch)


def in_lines(words):
    """A shell command, a line for each of its flags."""
    breaks = [" \\\n        " if word.startswith("--") else " " for word in words]
    return "".join(map("{}{}".format, breaks, map(shlex.quote, words))).strip()


def fill(template, **values):
    """The template with each {{WORD}} replaced; an InputError for one that has no value."""

    def value(match):
        if match[1].lower() not in values:
            raise InputError(f"{TEMPLATE}: knows no {match[0]}")
        return str(values[match[1].lower()])

    return re.sub(r"{{(\w+)}}", value, template)


def submit(script, save_folder):
    """Hands the script to sbatch, which keeps it; says where its output goes."""
    if shutil.which("sbatch") is None:
        raise InputError("sbatch is not here: log in where it is, or see the script by --dry_run")
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"sbatch: {done.stderr.strip().splitlines()[-1]}")
    job = done.stdout.split(";")[0].strip()
    print(f"job {job}; its output: {os.path.abspath(f'slurm-{job}.out')}")
    print(f"its run: {os.path.abspath(os.path.expanduser(save_folder))}/models/")


if __name__ == "__main__":
    main()
