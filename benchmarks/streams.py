"""Many streams open at once in one process: does any fail, what does each cost in memory, how late do events arrive?

    make bench-streams                                   1,000 streams
    make bench-streams ARGS="--streams 2000 --seconds 20"

Three processes on this machine: a scripted provider that sends each stream an event at a fixed interval with the time at
which it was sent, the gateway with recording on, and the client (this one). The delay of an event is from the provider's
write to the client's read, so it includes what the provider and the client themselves cost. Prints one JSON object.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

SENT = re.compile(rb'"text":"(\d+)"')
START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_bench","type":"message","role":"assistant",'
    b'"model":"bench","content":[],"usage":{"input_tokens":10,"output_tokens":1}}}\n\n'
    b"event: content_block_start\n"
    b'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
)
STOP = (
    b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
    b"event: message_delta\n"
    b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":9}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
DELTA = (
    "event: content_block_delta\n"
    'data: {{"type":"content_block_delta","index":0,"delta":{{"type":"text_delta","text":"{}"}}}}\n\n'
)


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def provide(listener: socket.socket, interval: float, seconds: float) -> None:
    """The provider's process: every stream lasts `seconds` from its first event, one event each `interval`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        await reader.readexactly(int(length.group(1)) if length else 0)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(chunk(START))
        end = time.monotonic() + seconds
        await asyncio.sleep(interval * (id(writer) % 997) / 997)  # spread over the interval
        while time.monotonic() < end:
            writer.write(chunk(DELTA.format(time.monotonic_ns()).encode()))
            await asyncio.sleep(interval)
        writer.write(chunk(STOP) + b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(answer, sock=listener, backlog=4096):
            await asyncio.Event().wait()

    raise_open_files()
    asyncio.run(run())


async def stream(port: int, body: bytes, delays: list[int], started: asyncio.Semaphore) -> bool:
    """One client: whether its stream was complete. Delays in nanoseconds go into `delays`."""
    async with started:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /anthropic/v1/messages HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        tail = await reader.read(65536)
    while data := await reader.read(65536):
        now = time.monotonic_ns()
        delays += [now - int(sent) for sent in SENT.findall(data)]
        tail = (tail + data)[-200:]
    writer.close()
    return b'"message_stop"' in tail and tail.endswith(b"0\r\n\r\n")


def memory(pid: int) -> int:
    """Resident memory of a process in KB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def cpu_seconds(pid: int) -> float:
    """What a process has used of a processor, user and system."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def raise_open_files() -> None:
    """As many sockets as the system lets us have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def wait_until_ready(port: int) -> None:
    """Wait until the gateway accepts connections, at most 20 seconds."""
    for _ in range(200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    raise RuntimeError("the gateway did not start")


async def measure(options: argparse.Namespace, gateway: subprocess.Popen[bytes], port: int) -> dict[str, Any]:
    """Open all streams, measure while they are open, and see how they end."""
    await wait_until_ready(port)
    message = {"role": "user", "content": "x" * options.body}
    body = json.dumps({"model": "bench", "max_tokens": 100, "stream": True, "messages": [message]}).encode()
    started = asyncio.Semaphore(50)
    at_rest = memory(gateway.pid)
    delays: list[int] = []
    streams = [asyncio.create_task(stream(port, body, delays, started)) for _ in range(options.streams)]
    await asyncio.sleep(options.seconds * 0.6)  # all are open now
    opening, with_streams = len(delays), memory(gateway.pid)
    complete = sum(await asyncio.gather(*streams))
    steady = sorted(delay / 1e6 for delay in delays[opening // 2 :])
    return {
        "streams": options.streams,
        "complete": complete,
        "failed": options.streams - complete,
        "events": len(delays),
        "events_per_second": round(options.streams / options.interval),
        "delay_ms_median": round(statistics.median(steady), 2),
        "delay_ms_p99": round(steady[int(len(steady) * 0.99)], 2),
        "gateway_rss_mb_at_rest": round(at_rest / 1024, 1),
        "gateway_rss_mb_with_streams": round(with_streams / 1024, 1),
        "kb_per_stream": round((with_streams - at_rest) / options.streams, 1),
        "gateway_cpu_seconds": cpu_seconds(gateway.pid),
        "python": platform.python_version(),
    }


def main() -> None:
    """Run the three processes and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each stream lasts")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two events of a stream")
    parser.add_argument("--body", type=int, default=2000, help="bytes of the prompt")
    options = parser.parse_args()
    raise_open_files()
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    provider = multiprocessing.Process(target=provide, args=(listener, options.interval, options.seconds), daemon=True)
    provider.start()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{listener.getsockname()[1]}"}
        command = [sys.executable, "-m", "aibridge", "serve", "--port", str(port)]
        gateway = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
        try:
            found = asyncio.run(measure(options, gateway, port))
        finally:
            gateway.send_signal(signal.SIGTERM)
            gateway.wait(30)
            provider.terminate()
        with closing(sqlite3.connect(Path(folder) / "aibridge.db")) as ledger:
            query = "SELECT status, count(*) FROM aibridge_interceptions GROUP BY status"
            found["ledger"] = dict(ledger.execute(query).fetchall())
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
