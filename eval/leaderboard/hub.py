"""Whether Hugging Face's hub answers: without it every data set would be asked for again and again.

lm-evaluation-harness loads each task by the `datasets` library, which retries for half a minute,
and several files per task. Offline, it takes what its cache holds and fails at once for the rest.
"""

import logging
import os
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

logger = logging.getLogger(__name__)

HUB = "https://huggingface.co"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")  # variables of huggingface_hub and datasets
ANSWER_SECONDS = 10.0  # of the hub; in all, for names and connections have their own limits


def use_cache_without_hub() -> None:
    """Set HF_HUB_OFFLINE, with a warning, where the hub does not answer.

    Call it before huggingface_hub is imported, which reads the variable once.
    """
    if any(os.environ.get(name) for name in OFFLINE):
        return
    hub = os.environ.get("HF_ENDPOINT") or HUB
    if (error := unreachable_reason(hub)) is not None:
        logger.warning(f"{hub} does not answer ({error}): only cached data sets are used (HF_HOME)")
        os.environ["HF_HUB_OFFLINE"] = "1"


def unreachable_reason(url: str, seconds: float = ANSWER_SECONDS) -> str | None:
    """Why no server answers at a URL, through the environment's proxy; None if one does."""
    reasons: list[str | None] = []

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=seconds).close()
        except HTTPError:  # an answer
            reasons.append(None)
        except (OSError, ValueError) as error:
            reasons.append(str(getattr(error, "reason", error)))
        else:
            reasons.append(None)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return reasons[0] if reasons else f"nothing within {seconds:g} s"
