# SPDX-License-Identifier: Apache-2.0
"""Open a page for the browser that shows one or more models: continue a text (causal), fill masks (masked), and look
inside their attention. Prints the page's address; Ctrl+C ends it."""

from .options import OptionParser, find_device, number


def main() -> None:
    parser = OptionParser(description=__doc__)
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="a causal or masked model: folder or name on the Hub"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; default: %(default)s")
    parser.add_argument("--port", type=number(int, least=1, most=65535), default=7860, help="default: %(default)s")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; default: the accelerator, if any")
    args = parser.parse_args()
    from .page import build_page, launch, load_shown  # after --help, which does not need the extra

    device = find_device(args.device)
    page = build_page({name: load_shown(name, device) for name in args.folders})
    print(launch(page, args.host, args.port), flush=True)
    page.block_thread()
