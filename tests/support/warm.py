# SPDX-License-Identifier: Apache-2.0
"""Python processes that start soon. A stand-in for the interpreter (`python()`) hands its arguments, folder,
environment and open files to a server that has imported torch and what else takes seconds, and the server forks.

Nothing of Hugging Face's is there before the fork, nor matplotlib: they read the environment when they are imported.
What a test says of imports, memory or signals needs `sys.executable` itself."""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path


IMPORTED = ("torch", "torch._dynamo", "torch._inductor.decomposition", "torch.distributed.tensor",
            "torch.distributed.checkpoint", "torch.distributed.run", "torch.distributed.fsdp", "torchao", "pandas",
            "pyarrow.dataset", "scipy.optimize")  # fmt: skip
MOST = 2**20  # bytes of a request


@functools.cache
def python() -> str:
    """Path of the stand-in, whose server ends with this process; the interpreter's own where there can be none."""
    import torch

    if torch.cuda.is_available() or not hasattr(os, "pidfd_open") or not hasattr(socket, "SOCK_SEQPACKET"):
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    stand_in, address = Path(folder.name, "python"), f"{folder.name}/socket"
    words = [sys.executable, "-SEs", __file__, "ask", address]
    stand_in.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    stand_in.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen([sys.executable, __file__, "serve", address], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, env={**environment, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert server.stdout.readline() == b"ready\n"

    @atexit.register
    def end():
        server.communicate()
        folder.cleanup()

    return str(stand_in)


# --- the stand-in ----------------------------------------------------------------------------------------------------
def ask(address: str, *words: str) -> None:
    rest = words[1:] if words[:1] == ("-u",) else words
    if not rest or (rest[0].startswith("-") and rest[0] not in ("-c", "-m")):
        os.execv(sys.executable, [sys.executable, *words])
    request = {"words": rest, "folder": os.getcwd(), "environment": dict(os.environ), "unbuffered": rest is not words}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST)
        server.connect(address)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: server.send(bytes([number])))
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        code = json.loads(server.recv(16))
    if code < 0:
        if code != -signal.SIGKILL:  # which nobody can handle
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


# --- the server ------------------------------------------------------------------------------------------------------
def serve(address: str) -> dict:
    """Fork for every request; return, in the fork alone, what was asked for."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or every fork would go through them again, at its end at the latest
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MOST)
    listener.bind(address)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                client = listener.accept()[0]
                request, files, *_ = socket.recv_fds(client, MOST, 3)
                pid = os.fork()
                if not pid:
                    selector.close()
                    listener.close()
                    client.close()
                    for file, number in zip(files, (0, 1, 2), strict=True):
                        os.dup2(file, number)
                        os.close(file)
                    return json.loads(request)
                for file in files:
                    os.close(file)
                selector.register(client, selectors.EVENT_READ, (pid, None))
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, client))
            elif key.data is None:
                sys.exit()  # the tests have ended
            else:
                pid, client = key.data
                if client is not None:
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    selector.unregister(key.fileobj)
                    os.close(key.fileobj)
                    if client in selector.get_map():
                        selector.unregister(client)
                        with contextlib.suppress(OSError):  # it may be gone by now
                            client.send(json.dumps(code).encode())
                    client.close()
                elif key.fileobj.fileno() >= 0:  # the stand-in passes a signal on, or is gone before its process
                    number = key.fileobj.recv(1)
                    os.kill(pid, number[0] if number else signal.SIGKILL)
                    if not number:
                        selector.unregister(key.fileobj)


def run(request: dict) -> None:
    """What `python WORDS` does, in the environment of who asked."""
    words, environment = request["words"], request["environment"]
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(environment)
    if request["unbuffered"] or environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    sys.modules["numpy"].random.seed()
    paths = list(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))
    first = os.path.dirname(os.path.abspath(words[0])) if not words[0].startswith("-") else os.getcwd()
    sys.path[:] = [first, *paths, *sys.path[1:]]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        main.__builtins__ = __builtins__
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask(*sys.argv[2:])
    else:
        run(serve(sys.argv[2]))
