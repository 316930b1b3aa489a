"""Verify a published encoder: `python -m modeling_gemma_encoder.hub verify me/my-ranker`.

`examples/publish.py` publishes a model.
"""

import argparse
import json
import sys

from huggingface_hub.errors import HfHubHTTPError

from .verification import verify


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_gemma_encoder.hub",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="load a folder or repository in a fresh process, and compare")
    check.add_argument("source", help="A folder, or a repository on the Hub.")
    check.add_argument("--revision", help="A branch, tag or commit.")
    check.add_argument(
        "--trust_remote_code", action="store_true", help="Run code that differs from this package's own."
    )
    check.add_argument("--device", default="cpu", help="The device to compute outputs on.")
    check.add_argument("--json", action="store_true", help="Print the checks as JSON.")
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    try:
        checks = verify(
            args.source, revision=args.revision, trust_remote_code=args.trust_remote_code, device=args.device
        )
    except (ValueError, OSError, HfHubHTTPError) as error:
        parser.exit(2, f"{parser.prog} verify: error: {error}\n")
    if args.json:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        print("\n".join(map(str, checks)))
    sys.exit(0 if all(check.passed for check in checks) else 1)


if __name__ == "__main__":
    main()
