"""Being told beforehand that the machine will be taken away: Google Cloud's notice to preemptible VMs and TPUs.

Other platforms send SIGTERM, or the signal that Slurm was told to send; `signals` takes both.
"""

import os
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

_PRODUCT = Path("/sys/class/dmi/id/product_name")
_PATH = "/computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=300"
_ANSWER_SECONDS = 330  # the server answers after 300 at the latest
_PAUSE_SECONDS = 5


def metadata_server() -> str | None:
    """The address of Google Cloud's metadata server, if this machine is one of its; GCE_METADATA_HOST overrides."""
    if named := os.environ.get("GCE_METADATA_HOST"):
        return named
    try:
        return "metadata.google.internal" if "Google" in _PRODUCT.read_text() else None
    except OSError:
        return None


def watch(notify: Callable[[str], None]) -> threading.Thread | None:
    """Calls `notify` with a line, once, when the machine is about to be taken away; from a thread of its own.

    Returns:
      The thread, which ends with the process; None where nobody would tell.
    """
    server = metadata_server()
    if server is None:
        return None
    thread = threading.Thread(target=_watch, args=(server, notify), name="preemption", daemon=True)
    thread.start()
    return thread


def _watch(server: str, notify: Callable[[str], None]) -> None:
    request = urllib.request.Request(f"http://{server}{_PATH}", headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine's own link
    while True:
        try:
            with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                if answer.read().strip().upper() == b"TRUE":
                    notify("Google Cloud takes this machine away")
                    return
        except OSError:  # the server restarts now and then
            time.sleep(_PAUSE_SECONDS)
