"""Copy checkpoints to and from a hub: seqssm hub push CHECKPOINT OWNER/NAME, seqssm hub pull OWNER/NAME FOLDER.

A place that begins with ./, / or ~, or is there, is a folder; others are repositories on huggingface.co, on the server
that HF_ENDPOINT names, or on --endpoint. Log in with `hf auth login`, or set HF_TOKEN.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="{push,pull}", required=True)
    push = actions.add_parser("push", help="copy a checkpoint to a repository or a folder")
    push.add_argument("checkpoint", help="a folder in hub format, or a shipped name")
    push.add_argument("place", help="OWNER/NAME, or a folder")
    push.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    push.add_argument("--message", default="", help="of the commit")
    pull = actions.add_parser("pull", help="copy a checkpoint from a repository or a folder")
    pull.add_argument("place", help="OWNER/NAME, or a folder")
    pull.add_argument("folder", type=Path, help="to write; a checkpoint there is replaced")
    pull.add_argument("--revision", help="branch, tag or commit (default: main)")
    for action in (push, pull):
        action.add_argument("--endpoint", help="URL of the hub; default: HF_ENDPOINT, else https://huggingface.co")


def run(args: argparse.Namespace) -> None:
    from seqssm.hub import remote

    if args.action == "push":
        place = remote.push(
            args.checkpoint, args.place, endpoint=args.endpoint, private=args.private, message=args.message
        )
        print(f"pushed {args.checkpoint} to {place}")
    else:
        folder = remote.pull(args.place, args.folder, endpoint=args.endpoint, revision=args.revision)
        print(f"pulled {args.place} to {folder}")
