"""Headless Chromium for tests, through the pipes of its DevTools protocol; and a static server that notes what it is asked for."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PROGRAM = os.environ.get("CHROMIUM", "chromium")
PATIENCE = 120
"""Seconds after which a page is taken to be stuck; nothing here measures time."""
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
_START = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
"""Chromium reads commands from descriptor 3 and writes answers to 4."""


class Chromium:
    """One browser with one page."""

    def __init__(self, profile: Path, *flags: str) -> None:
        if shutil.which(PROGRAM) is None:
            pytest.skip(f"{PROGRAM}: not installed; CHROMIUM names another program")
        commands, answers = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands[0], answers[1])]
        start = [sys.executable, "-c", _START, *map(str, ends), PROGRAM, *_FLAGS, f"--user-data-dir={profile}", *flags]
        nothing = subprocess.DEVNULL
        self.process = subprocess.Popen([*start, "about:blank"], pass_fds=ends, stdout=nothing, stderr=nothing)
        for end in (commands[0], answers[1], *ends):
            os.close(end)
        self._to, self._from = commands[1], answers[0]
        self._rest, self._number, self._loaded = b"", 0, False
        self._answers: dict[int, dict[str, Any]] = {}
        self.requests: list[str] = []
        """The address of everything that the page, its workers and its service worker asked for."""
        self.complaints: list[str] = []
        """Exceptions and errors of the console."""
        (page,) = [one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        self._session = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True)

    def close(self) -> None:
        self._send("Browser.close", None)
        self.process.wait(PATIENCE)
        for end in (self._to, self._from):
            os.close(end)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command to the page."""
        return self._call(method, self._session, **parameters)

    def browser(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command to the browser."""
        return self._call(method, **parameters)

    def open(self, address: str) -> None:
        """Opens a page and waits for its last element."""
        self._loaded = False
        failure = self.call("Page.navigate", url=address).get("errorText")
        assert not failure, f"{address}: {failure}"
        while not self._loaded:
            self._read()

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Waits until an expression is true in the page, and returns its value."""
        return wait_for(lambda: self.evaluate(expression), lambda: f"{expression}; {self.evaluate('document.body.innerText')}")

    def click(self, selector: str) -> None:
        """A click with the mouse in the middle of an element."""
        middle = self.evaluate(
            f"(() => {{ const one = document.querySelector({selector!r}); one.scrollIntoView({{ block: 'center' }});"
            " const at = one.getBoundingClientRect(); return [at.x + at.width / 2, at.y + at.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=middle[0], y=middle[1], button="left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def choose(self, selector: str, path: Path) -> None:
        """Gives an input a file, as a person does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path.resolve())])

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = self._send(method, session, **parameters)
        while number not in self._answers:
            self._read()
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _send(self, method: str, session: str | None, **parameters: Any) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        return self._number

    def _read(self) -> None:
        ready, _, _ = select.select([self._from], [], [], PATIENCE)
        assert ready, "Chromium does not answer"
        new = os.read(self._from, 1 << 20)
        assert new, f"Chromium has ended with {self.process.wait(PATIENCE)}"
        *messages, self._rest = (self._rest + new).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._note(message["method"], message["params"])

    def _note(self, event: str, content: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(content["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(content["exceptionDetails"].get("exception", content["exceptionDetails"])))
        elif event == "Log.entryAdded" and content["entry"]["level"] == "error":
            self.complaints.append(f"{content['entry']['text']} {content['entry'].get('url', '')}")
        elif event == "Target.attachedToTarget":
            for method in ("Network.enable", "Log.enable", "Runtime.enable", "Runtime.runIfWaitingForDebugger"):
                self._send(method, content["sessionId"])


def wait_for(condition: Callable[[], Any], said: Callable[[], str]) -> Any:
    """Waits for something that comes true, and returns it; otherwise fails with what is said."""
    last = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < last, said()
        time.sleep(0.05)
    return value


@contextmanager
def chromium(profile: Path, *flags: str) -> Iterator[Chromium]:
    browser = Chromium(profile, *flags)
    try:
        yield browser
    finally:
        browser.close()


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[tuple[str, list[str]]]:
    """What `python -m http.server` does in a folder; gives its address, and notes each path that it is asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()
