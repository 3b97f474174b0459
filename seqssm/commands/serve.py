"""Serve a recogniser to live clients: a page with microphone and file picker, and a WebSocket for other programs.

Open http://localhost:8000 once it says that it listens. What is said on the WebSocket is described in
seqssm/serving/protocol.py. There are no passwords: only this machine is listened to unless --host says otherwise, and
then a proxy that asks for one belongs in front. Browsers give their microphone to pages from localhost, or with --tls.
--load-test measures how long live clients wait on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqssm.commands.arguments import add_device_argument, chunk_ms, positive, seed
from seqssm.commands.transcribe import add_decoding_arguments, add_stream_arguments, decoding_config, set_threads
from seqssm.errors import UserError
from seqssm.tasks.asr_network import ASRNetwork
from seqssm.tasks.network import checkpoint_or_default

if TYPE_CHECKING:
    from seqssm.serving.server import Server, Service

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", help="of a recogniser: a shipped name, a folder in hub format, or a Lightning .ckpt"
    )
    parser.add_argument("--tag-checkpoint", help="of a causal tagger, for live tags beside the text")
    add_device_argument(parser)
    net = parser.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    net.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0 takes a free one")
    net.add_argument(
        "--origin", action="append", default=[], help="of other pages that may connect; * for all; repeatable"
    )
    net.add_argument("--tls-cert", type=Path, help="certificate chain (PEM), for https and wss")
    net.add_argument("--tls-key", type=Path, help="its private key (PEM)")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--sessions", type=int, default=20, help="clients at once (default: %(default)s)")
    limits.add_argument("--session-minutes", type=float, default=240.0, help="of a client (default: %(default)g)")
    limits.add_argument("--frame-kib", type=float, default=256.0, help="of a client's frame (default: %(default)g)")
    limits.add_argument("--idle-s", type=float, default=30.0, help="without sound (default: %(default)g)")
    limits.add_argument(
        "--ahead-s", type=float, default=5.0, help="that a client may be ahead of real time (default: %(default)g)"
    )
    limits.add_argument(
        "--speed",
        type=float,
        default=4.0,
        help="beyond that, sound is read so many times as fast as it is spoken; 0: as fast as it can be (default: 4)",
    )
    add_stream_arguments(parser)
    parser.add_argument(
        "--tag-chunk-ms", type=chunk_ms, default=480.0, help="heard at once by the tagger (default: 480)"
    )
    add_decoding_arguments(parser)
    segments = parser.add_argument_group("segments end")
    segments.add_argument("--silence-s", type=float, default=2.4, help="after so much silence (default: 2.4)")
    segments.add_argument("--after-text-s", type=float, default=1.2, help="so long after some text (default: 1.2)")
    segments.add_argument("--longest-s", type=float, default=20.0, help="when so long, between words (default: 20)")
    load = parser.add_argument_group("load test")
    load.add_argument(
        "--load-test", type=positive, metavar="N", help="have N live clients speak, print how long they wait"
    )
    load.add_argument("--load-s", type=float, default=30.0, help="that they speak (default: 30)")
    load.add_argument("--load-sound", type=Path, help="a recording or a folder of some to say; default: noise")
    load.add_argument("--packet-ms", type=float, default=100.0, help="of their packets (default: 100)")
    load.add_argument("--url", help="of a server that runs already, such as ws://localhost:8000/stream")
    load.add_argument("--seed", type=seed, default=0, help="of the load test")


def run(args: argparse.Namespace) -> int:
    need_extra()
    if args.url is not None:
        if not args.load_test:
            raise UserError("--url is for --load-test: say how many clients")
        print(asyncio.run(_load_clients(args, args.url)))
        return 0
    if args.load_test:
        args.sessions = max(args.sessions, args.load_test)
    args.checkpoint = checkpoint_or_default(args.checkpoint, ASRNetwork)
    _check(args)
    set_threads(args)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    listener = _listen(args.host, args.port, args.idle_s)
    with listener:
        scheme = "http" if args.tls_cert is None else "https"
        port = listener.getsockname()[1]
        service = make_service(args, scheme, port)
        server = _server(args, service)
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(
            f"seqssm: listening on {scheme}://{host}:{port} for {args.sessions} sessions", file=sys.stderr, flush=True
        )
        try:
            if args.load_test:
                url = f"{'ws' if scheme == 'http' else 'wss'}://{host}:{port}/stream"
                print(asyncio.run(_load_server(args, server, listener, url)))
            else:
                server.run(sockets=[listener])
        except KeyboardInterrupt:
            print("seqssm: stopped", file=sys.stderr)
    return 1 if service.failed else 0


def need_extra() -> None:
    """Raises UserError where the packages of the extra `serve` are not installed."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs the package {error.name}: pip install 'seqssm[serve]'") from error


def _check(args: argparse.Namespace) -> None:
    for name in ("packet_ms", "load_s"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name):g}: it must be positive")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port is {args.port}: it must lie between 0 and 65535")
    if (args.tls_cert is None) != (args.tls_key is None):
        raise UserError("--tls-cert and --tls-key belong together: give both")
    for path in (args.tls_cert, args.tls_key):
        if path is not None and not path.is_file():
            raise UserError(f"{path} does not exist: correct the path")


def _listen(host: str, port: int, idle_s: float) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host}, port {port}: {why}; choose another --host or --port") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # A client that takes nothing, or that is gone without a word, is cut off by the system; Linux hands the option
        # on to the connections.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(2000 * idle_s))
    return listener


def make_service(args: argparse.Namespace, scheme: str, port: int) -> Service:
    """The models, warmed up, and the limits that the arguments ask for."""
    from seqssm.serving.client import Limits
    from seqssm.serving.engine import Recogniser, TagEngine
    from seqssm.serving.server import Service
    from seqssm.tasks.asr_decoding import decoders
    from seqssm.tasks.network import load_network
    from seqssm.tasks.tagging_network import TaggingNetwork
    from seqssm.tasks.transcripts import EndpointRules

    limits = Limits(
        sessions=args.sessions,
        frame_bytes=round(1024 * args.frame_kib),
        session_s=60 * args.session_minutes,
        idle_s=args.idle_s,
        ahead_s=args.ahead_s,
        speed=args.speed,
    )
    rules = EndpointRules(args.silence_s, args.after_text_s, args.longest_s)
    task = load_network(args.checkpoint, ASRNetwork).to(args.device)
    if args.lookahead_ms is not None:
        task.eval_choice = task.menu_position(args.lookahead_ms)  # of clients that do not choose
    make_decoder = decoders(task, decoding_config(args))
    recogniser = Recogniser(task, args.sessions, args.chunk_ms, make_decoder, rules, args.threads)
    recogniser.warm_up()
    tagger = None
    if args.tag_checkpoint is not None:
        tagging = load_network(args.tag_checkpoint, TaggingNetwork).to(args.device)
        tagger = TagEngine(tagging, args.tag_chunk_ms / 1000, args.threads)
    hosts = {*LOOPBACK, f"[{args.host}]" if ":" in args.host else args.host}
    origins = frozenset({f"{scheme}://{host}:{port}" for host in hosts} | {o.rstrip("/") for o in args.origin})
    return Service(recogniser, tagger, limits, None if "*" in args.origin else origins)


def _server(args: argparse.Namespace, service: Service) -> Server:
    from seqssm.serving.server import Server

    if args.host not in ("localhost", "127.0.0.1", "::1"):
        logging.warning("whoever reaches %s can use this server: it asks for no password", args.host)
    if args.tls_cert is None:
        return Server(service)
    try:
        server = Server(service, ssl_certfile=args.tls_cert, ssl_keyfile=args.tls_key)
        server.config.load()
    except OSError as error:  # ssl.SSLError is one
        raise UserError(
            f"--tls-cert {args.tls_cert}, --tls-key {args.tls_key}: {error}; give a matching pair"
        ) from error
    return server


# ---- load test -------------------------------------------------------------------------------------------------------


async def _load_server(args: argparse.Namespace, server: Server, listener: socket.socket, url: str) -> str:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            await asyncio.sleep(0.05)
        return await _load_clients(args, url)
    finally:
        server.should_exit = True
        await serving


async def _load_clients(args: argparse.Namespace, url: str) -> str:
    """Run the clients in a process of their own, so that they take no time of the server's; their figures as text."""
    settings: dict[str, Any] = {
        "--sessions": args.load_test,
        "--seconds": args.load_s,
        "--packet-ms": args.packet_ms,
        "--seed": args.seed,
        "--lookahead-ms": args.lookahead_ms,
        "--sound": args.load_sound,
    }
    options = [str(part) for key, value in settings.items() if value is not None for part in (key, value)]
    clients = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "seqssm.serving.load", url, *options, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await clients.communicate()
    if clients.returncode:
        raise UserError("the load test's clients have stopped; their message is above")
    return report(json.loads(out))


def report(figures: dict[str, Any]) -> str:
    """A few lines for people."""

    def row(name: str, part: dict[str, float]) -> str:
        return f"{name:<34}" + "".join(f"{part[key]:>9,.0f}" for key in ("p50", "p90", "p99", "max"))

    return "\n".join(
        [
            f"{figures['sessions']} live sessions of {figures['seconds']:g} s at {figures['rate']:,} Hz, packets of "
            f"{figures['packet_ms']:g} ms; {figures['positions']:,} positions, {figures['results']:,} results",
            f"{'ms':<34}{'P50':>9}{'P90':>9}{'P99':>9}{'max':>9}",
            row("from sound to text, behind lookahead", figures["latency_ms"]),
            row("from Done to the last result", figures["final_ms"]),
            *([f"{figures['waited']} clients were kept waiting"] if figures["waited"] else []),
        ]
    )
