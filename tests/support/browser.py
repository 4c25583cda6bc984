"""A page in headless Chromium, driven by its debugging protocol through pipes, as a person would: keys and clicks."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A tab that shows a folder's index.html."""

    def __init__(self, commands: BinaryIO, replies: BinaryIO, url: str) -> None:
        self._commands = commands
        self._replies = replies
        self._count = 0
        self._session = None
        target = self._call("Target.createTarget", url=url)["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        session = {} if self._session is None else {"sessionId": self._session}
        message = json.dumps({"id": self._count, "method": method, "params": params, **session})
        self._commands.write(message.encode() + b"\0")
        while True:  # skip events and older replies; each message ends with a zero byte
            text = bytearray()
            while (byte := self._replies.read(1)) != b"\0":
                assert byte, "Chromium has ended"
                text += byte
            reply = json.loads(text)
            if reply.get("id") == self._count:
                assert "error" not in reply, reply
                return reply["result"]

    def value(self, expression: str) -> Any:
        """The value of an expression in JavaScript."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_until(self, expression: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, (expression, self.value("document.body.innerText"))
            time.sleep(0.05)

    def click(self, identifier: str) -> None:
        """Scroll to an element, and press and release the mouse in its middle."""
        self.value(f"document.getElementById('{identifier}').scrollIntoView()")
        box = f"document.getElementById('{identifier}').getBoundingClientRect()"
        x = self.value(f"{box}.x + {box}.width / 2")
        y = self.value(f"{box}.y + {box}.height / 2")
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type a text, key by key, where the focus is."""
        for character in text:
            key = {"text": "\r", "key": "Enter"} if character == "\n" else {"text": character}
            self._call("Input.dispatchKeyEvent", type="keyDown", **key)
            self._call("Input.dispatchKeyEvent", type="keyUp", **key)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def opened_page(folder: Path, profile: Path) -> Iterator[Page]:
    """Serve the folder on this machine and open its page; skip the test without Chromium."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    read, commands = os.pipe()
    replies, write = os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    shell = f'exec "$0" "$@" 3<&{read} 4>&{write}'  # Chromium reads commands from descriptor 3, and replies on 4
    browser = subprocess.Popen(
        ["bash", "-c", shell, CHROMIUM, *flags, f"--user-data-dir={profile}"],
        pass_fds=(read, write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read)
    os.close(write)
    try:
        with open(commands, "wb", buffering=0) as pipe, open(replies, "rb") as answers:
            yield Page(pipe, answers, f"http://127.0.0.1:{server.server_port}/index.html")
    finally:
        browser.kill()
        browser.wait()
        server.shutdown()
        server.server_close()
