"""`jaxinfer launch`: start a program as several processes that work on one model. Imports no jax."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from jaxinfer.errors import LaunchError
from sharding.distributed import HEARTBEAT, PATIENCE
from sharding.job import BACKENDS, Job, parse_hosts, read_hostfile


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "launch",
        help="start a program as several processes, on one host or many",
        usage="jaxinfer launch [OPTIONS] (SCRIPT.py | -m MODULE) [ARGUMENT ...]",
        description=(
            "Start a Python program as several processes (ranks) that jaxinfer connects. Stdout is that of rank 0; everything else goes to "
            "stderr with the rank's number. When a rank fails, the first one is named and the others are ended."
        ),
        epilog="""examples:
  jaxinfer launch --nproc 4 -m jaxinfer generate demo --prompt "Hello" --tp 4
  jaxinfer launch --hosts node1:8,node2:8 -m jaxinfer generate MODEL --tp 8 --pp 2 --prompt "Hello" --json
  jaxinfer launch --hostfile hosts --interface eth1 serve.py
  jaxinfer launch --nproc 4 --backend slurm script.py

exit status: that of the rank that failed first; 128 + n for signal n""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nproc", metavar="N", type=int, help="ranks in all; by default as many as the hosts have slots")
    add("--hosts", metavar="A,B:4", help="hosts, with the ranks that each takes")
    add("--hostfile", metavar="FILE", type=Path, help="hosts, one a line: name, or name slots=4")
    add("--backend", choices=BACKENDS, help="who starts the ranks; ssh where other hosts are given, local by default")
    add("--port", metavar="P", type=int, help="of the coordinator on the first host; a free one by default")
    add("--interface", metavar="NAME", help="network interface between the hosts; by default the one that the routes take")
    add(
        "--heartbeat",
        metavar="S",
        type=int,
        default=HEARTBEAT,
        help=f"seconds after which a rank that is not heard of ends all; {HEARTBEAT}",
    )
    add("--patience", metavar="S", type=int, default=PATIENCE, help=f"seconds until all ranks must have started; {PATIENCE}")
    add("--env", metavar="NAME=VALUE", action="append", default=[], help="a variable for every rank")
    add("--ssh", metavar="COMMAND", default="ssh", help='that reaches a host, such as "ssh -p 2222"')
    add("--tag", action="store_true", help="stdout of every rank on stdout, its number before each line")
    add("-m", dest="module", action="store_true", help="the program is a module")
    add("program", metavar="PROGRAM", nargs=argparse.REMAINDER, help="a script or module, and its arguments")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    if not args.program:
        args.parser.error("give a script, or -m and a module")
    if args.hosts and args.hostfile:
        args.parser.error("give --hosts or --hostfile, not both")
    if args.nproc is None and not (args.hosts or args.hostfile):
        args.parser.error("give the number of ranks with --nproc, or hosts with --hosts or --hostfile")
    program = args.program
    if not args.module:
        if not Path(program[0]).is_file():
            raise LaunchError(f"the script {program[0]} is not a file; give its path, or -m for a module")
        program = [os.path.abspath(program[0]), *program[1:]]
    env = {}
    for setting in args.env:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            args.parser.error(f"--env {setting}: write NAME=VALUE")
        env[name] = value
    # imported here: the other commands need none of it
    from sharding.launch import launch

    return launch(
        Job(
            command=[sys.executable, *(["-m"] if args.module else []), *program],
            ranks=args.nproc,
            hosts=parse_hosts(args.hosts) if args.hosts else read_hostfile(args.hostfile) if args.hostfile else (),
            backend=args.backend,
            port=args.port,
            interface=args.interface,
            heartbeat=args.heartbeat,
            patience=args.patience,
            tagged=args.tag,
            env=env,
            ssh=shlex.split(args.ssh),
        )
    )
