"""Processes that learn together, watched: where one ends or hangs, the others do not wait for ever.

A collective operation of MLX waits without end for a process that hangs, may fail without a name where one has ended,
and `mlx.launch` exits with 0 whatever happened. So in every process a thread tells the first one, over a connection of
its own, that it is there and what it is doing; whoever finds something wrong says so to all, and each ends with a
sentence. The first keeps the state of the last whole step, and writes what happened to `failed.json` beside it.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HOSTS = "MLX_HOSTFILE"  # the variable that mlx.launch names the ring's addresses in
BEAT = 1.0  # seconds between two signs of life
SILENCE = 15.0  # seconds without one after which a process counts as hanging
STUCK = 25.0  # seconds in which all wait for each other and nothing moves
SLOWEST = 10.0  # times the longest computation so far, after which one that goes on counts as hanging,
PATIENCE = 40.0  # but not before so many seconds
FIRST = 600.0  # seconds that the first computation may take: pictures are encoded in it
GRACE = 0.5  # seconds that news of a process that has ended may take
FAILED = "failed.json"


class Watchdog:
    """The thread that watches over the processes from this one.

    `folder` is where a failure is written, `keep` what saves the last whole step; both are set once they are known.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.folder: Path | None = None
        self.keep: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._doing, self._since, self._longest, self._rounds = "computing", time.monotonic(), 0.0, 0
        self._peers: dict[int, tuple[float, dict[str, Any]]] = {}  # when each was heard of, and what it said
        self._sockets: dict[int, socket.socket] = {}
        self._ended = False
        self._told: socket.socket | None = None

    @classmethod
    def start(cls, rank: int, size: int, total: Callable[[mx.array], mx.array]) -> "Watchdog":
        """Connect the processes and begin to watch; `total` adds an array up over all, which tells the address."""
        dog = cls(rank, size)
        server = socket.create_server(("", 0)) if rank == 0 else None
        told = np.zeros(5, np.int32)
        if server is not None:
            told = np.array([*map(int, _address().split(".")), server.getsockname()[1]], np.int32)
        *numbers, port = np.array(total(mx.array(told))).tolist()
        if server is not None:
            for _ in range(size - 1):
                connection, _ = server.accept()
                threading.Thread(target=dog._listen, args=(connection, None), daemon=True).start()
        else:
            connection = socket.create_connection((".".join(map(str, numbers)), port), timeout=SILENCE)
            connection.settimeout(None)
            dog._peers[0] = (time.monotonic(), {})
            dog._sockets[0] = connection
            threading.Thread(target=dog._listen, args=(connection, 0), daemon=True).start()
        threading.Thread(target=dog._watch, daemon=True).start()
        dog._notice_the_end()
        return dog

    def _notice_the_end(self) -> None:
        """Have a thread notice that this process is told to end: `mlx.launch` does that to all once one has ended.

        The main thread may be within MLX, where Python's own handlers do not run.
        """
        told, heard = socket.socketpair()
        told.setblocking(False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        self._told = told

        def wait() -> None:
            while numbers := heard.recv(64):
                if signal.SIGTERM in numbers:
                    time.sleep(GRACE)  # for the news of who has ended
                    self._fail("This process was told to end, as mlx.launch does where another one has ended")

        threading.Thread(target=wait, daemon=True).start()

    def say(self, doing: str) -> None:
        """Note what this process is doing: "computing", or "waiting" for the others."""
        with self._lock:
            now = time.monotonic()
            if self._doing == "computing" and doing == "waiting":
                self._rounds += 1
                if self._rounds > 1:  # the first is unlike all others
                    self._longest = max(self._longest, now - self._since)
            self._doing, self._since = doing, now

    def end(self) -> None:
        """Stop watching: this process is through, and the others may go on without it."""
        self._ended = True
        for connection in list(self._sockets.values()):
            with suppress(OSError):
                connection.sendall(b'{"ended": true}\n')

    def lost(self) -> None:
        """Have the watching threads end this process, as MLX has lost the connection to another one.

        They hear in a moment which one it was, or are saving the state already. Returns where they no longer watch.
        """
        time.sleep(GRACE)
        self._fail("The connection to another process was lost")
        time.sleep(PATIENCE)  # for the thread that is ending this process

    def _listen(self, connection: socket.socket, peer: int | None) -> None:
        """Take in what a process says until it says no more."""
        with suppress(OSError, ValueError), connection.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                said = json.loads(line)
                if peer is None:
                    peer = int(said["rank"])
                    self._sockets[peer] = connection
                if "failed" in said:
                    self._fail(said["failed"], tell=False)
                if said.get("ended"):
                    self._peers.pop(peer, None)
                    return
                self._peers[peer] = (time.monotonic(), said)
        if not self._ended and peer is not None and peer in self._peers:
            self._fail(f"Process {peer} has ended")

    def _watch(self) -> None:
        while not self._ended:
            time.sleep(BEAT)
            with self._lock:
                seconds, rounds = time.monotonic() - self._since, self._rounds
                sign = {
                    "rank": self.rank, "doing": self._doing, "seconds": seconds, "longest": self._longest,
                    "round": rounds, "pid": os.getpid(), "host": socket.gethostname(),
                }  # fmt: skip
            for connection in list(self._sockets.values()):
                with suppress(OSError):
                    connection.sendall((json.dumps(sign) + "\n").encode())
            if not self._ended and (wrong := self._wrong(sign)) is not None:
                self._fail(wrong)

    def _wrong(self, own: dict[str, Any]) -> str | None:
        """What is wrong with any process, in words."""
        now = time.monotonic()
        every = [own]
        for peer, (heard, said) in list(self._peers.items()):
            if now - heard > SILENCE:
                return f"Process {peer} hangs: it has given no sign of life for {SILENCE:.0f} seconds"
            if said:
                every.append(said)
        for each in every:
            usual = FIRST if each["round"] < 2 else max(PATIENCE, SLOWEST * each["longest"])
            if each["doing"] == "computing" and each["seconds"] > usual:
                return f"Process {each['rank']} hangs: it has been computing for {each['seconds']:.0f} seconds"
        if len(every) == self.size and all(e["doing"] == "waiting" and e["seconds"] > STUCK for e in every):
            return f"The processes have been waiting for each other for {STUCK:.0f} seconds"
        return None

    def _fail(self, what: str, *, tell: bool = True) -> None:
        """Say to all what has happened, keep the state, and end this process."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        if tell:
            for connection in list(self._sockets.values()):
                with suppress(OSError):
                    connection.sendall((json.dumps({"rank": self.rank, "failed": what}) + "\n").encode())
        for _, said in list(self._peers.values()):  # one that hangs on this machine would stay
            if what.startswith(f"Process {said.get('rank')} hangs") and said.get("host") == socket.gethostname():
                with suppress(OSError):
                    os.kill(int(said["pid"]), signal.SIGKILL)
        kept = ""
        try:
            if self.rank == 0:
                self.keep()
            if self.folder is not None and (self.rank == 0 or what.startswith("Process 0 ")):
                again = "start all again with 'fastvlm-mlx tune ... --resume'"
                kept = f"; the state in {self.folder.parent} is whole: {again}"
                note = {"process": self.rank, "failed": what, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
                (self.folder / FAILED).write_text(json.dumps(note) + "\n", encoding="utf-8")
        except Exception as error:  # the process ends in any case, and says so
            kept = f"; its state could not be kept ({error})"
        print(f"fastvlm-mlx: {what}, so process {self.rank} ends as well{kept}.", file=sys.stderr, flush=True)
        os._exit(1)


def _address() -> str:
    """An address of this machine that the others can reach: the ring's, where mlx.launch has written it."""
    try:
        return str(json.loads(Path(os.environ[HOSTS]).read_text(encoding="utf-8"))[0][0]).rpartition(":")[0]
    except (KeyError, OSError, ValueError, IndexError, TypeError):
        return socket.gethostbyname(socket.gethostname())


def failure(out: Path) -> str | None:
    """What ended the last run of several processes in this folder, if something did."""
    try:
        return str(json.loads((out / "state" / FAILED).read_text(encoding="utf-8"))["failed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
