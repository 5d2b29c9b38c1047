"""Encoders by name: which ones exist, which input they expect, and where their ImageNet weights come from."""

from __future__ import annotations

import difflib
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

import timm
import torch
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from torch import nn

from mgd_pipeline.errors import WeightsError
from mgd_pipeline.networks.normalisation import IMAGENET, Normalisation
from mgd_pipeline.networks.weights import fitting_state, read_state_dict

_MINUS_ONE_TO_ONE = Normalisation((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))
_PUBLISHED = {
    "dpn": Normalisation((124.0, 117.0, 104.0), (1 / 0.0167, 1 / 0.0167, 1 / 0.0167)),
    **dict.fromkeys(("inceptionresnetv2", "inceptionv4", "timm-tf_efficientnet_lite", "xception"), _MINUS_ONE_TO_ONE),
}
"""Inputs of smp's own encoders whose ImageNet weights were not trained with IMAGENET, by how the encoders' names begin.
smp 0.6 keeps these numbers on the hub, in config.json beside the weights; smp 0.5 had them in its code. Its `advprop` weights of
EfficientNet, which `imagenet` never names, have inputs from -1 to 1."""
_FILE = "model.safetensors"
"""Name of the file of weights in a repository of the hub."""
_PORTS = {"http": 80, "socks5": 1080}
"""Where an address names no port; 443 for all other schemes."""


def normalisation(encoder: str) -> Normalisation:
    """The input normalisation with which the encoder's ImageNet weights were trained."""
    if encoder.startswith("tu-"):
        return timm_normalisation(encoder[3:])
    return next((published for start, published in _PUBLISHED.items() if encoder.startswith(start)), IMAGENET)


def timm_normalisation(name: str) -> Normalisation:
    """The input normalisation of a timm model's published weights; IMAGENET if there are none."""
    config = timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
    if config is None:
        return IMAGENET
    mean, std = (tuple(float(v) * 255 for v in values) for values in (config.mean, config.std))
    return Normalisation(mean, std)  # pyright: ignore[reportArgumentType]


def unrecorded_normalisation(encoder: str) -> Normalisation:
    """The input normalisation of a network that version 0.1.0 trained. That version did not record it, and knew only timm's own
    numbers and IMAGENET."""
    return timm_normalisation(encoder[3:]) if encoder.startswith("tu-") else IMAGENET


def any_size(name: str) -> dict[str, Any]:
    """Options that let a timm model take inputs of any size, if it has such an option. Nothing is computed."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    return {"dynamic_img_size": True} if hasattr(model, "dynamic_img_size") else {}


def check_encoder(encoder: str) -> None:
    """Raises WeightsError for a name that neither smp nor timm knows."""
    if encoder.startswith("tu-"):
        name, _, tag = encoder[3:].partition(".")
        if not timm.is_model(name) or (tag and not timm.is_model_pretrained(encoder[3:])):
            raise WeightsError(f"encoder {encoder!r} is unknown to timm{_nearest(name, timm.list_models(), 'tu-')}")
    elif encoder not in smp_encoders:
        timms = f"tu-{encoder}" if timm.is_model(encoder) else "tu-<name>"
        near = "" if timm.is_model(encoder) else _nearest(encoder, smp_encoders, "")
        raise WeightsError(f"encoder {encoder!r} is unknown to segmentation-models-pytorch{near}; timm's are written {timms}")


def _nearest(name: str, known: Iterable[str], prefix: str) -> str:
    close = difflib.get_close_matches(name.strip().lower(), known, n=1)
    return f"; nearest is {prefix}{close[0]}" if close else ""


def resolve_encoder_weights(encoder: str, weights: str, base: Path = Path(), *, fetch: bool = True) -> Path | None:
    """The file that holds an encoder's initial weights; None for `none`.

    `imagenet` is looked up in the local hub cache, then fetched from the hub. If the hub cannot be reached, a WeightsError says
    at once which file goes where; the hub's own client would retry for most of a minute. With `fetch=False` nothing is
    fetched, and weights that are published but not on this machine are None as well.
    """
    if weights == "none":
        return None
    if weights != "imagenet":
        path = base / weights
        if not path.is_file():
            raise WeightsError(
                f"encoder_weights: {path}: no such file; put the state dict of {encoder} there, or write none or imagenet"
            )
        return path
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    repository, revision = _published(encoder)
    cached = try_to_load_from_cache(repository, _FILE, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    if not fetch:
        return None
    if hub_reached():
        return Path(hf_hub_download(repository, _FILE, revision=revision))
    raise WeightsError(
        f"ImageNet weights of {encoder} are not on this machine and the hub cannot be reached. On a connected machine run "
        f"`{fetch_command(encoder)}`, copy the file here and write its path as encoder_weights (or copy the hub's cache folder to "
        f"{constants.HF_HUB_CACHE})"
    )


def fetch_command(encoder: str) -> str:
    """The command that puts an encoder's ImageNet weights into the hub's cache. Raises WeightsError if none are published."""
    repository, revision = _published(encoder)
    return f"hf download {repository} {_FILE}{f' --revision {revision}' if revision else ''}"


def _published(encoder: str) -> tuple[str, str | None]:
    """Repository and revision on the hub of an encoder's ImageNet weights."""
    if encoder.startswith("tu-"):
        config = timm.get_pretrained_cfg(encoder[3:])
        repository, revision = (config.hf_hub_id if config is not None else None), None
    else:
        settings = smp_encoders[encoder]["pretrained_settings"].get("imagenet", {})
        repository, revision = settings.get("repo_id"), settings.get("revision")
    if repository is None:
        raise WeightsError(f"encoder {encoder}: no ImageNet weights are published for it; use encoder_weights: none or a file")
    return repository, revision


def hub_reached() -> bool:
    """Whether weights can be fetched: the hub's client may use the network, and the hub accepts a connection."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and reachable(constants.ENDPOINT)


def reachable(endpoint: str) -> bool:
    """Whether the host of a URL, or the proxy that leads there, accepts a connection within 1.5 s, including the look-up of its
    name, which has no time-out."""
    url = urlparse(endpoint)
    proxy = None if proxy_bypass(url.hostname or "") else getproxies().get(url.scheme)
    asked = url if proxy is None else urlparse(proxy if "://" in proxy else f"//{proxy}")
    connected = threading.Event()

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection((asked.hostname or "", asked.port or _PORTS.get(asked.scheme, 443)), timeout=1.5).close()
            connected.set()

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(1.5)
    return connected.is_set()


def load_encoder(encoder: nn.Module, name: str, path: Path) -> None:
    """Strict: each tensor of the encoder is set, and only a classifier's tensors may stay unused. Raises WeightsError."""
    target, classifier = encoder, {"fc.weight", "fc.bias", "classifier.1.weight", "classifier.1.bias"}
    if name.startswith("tu-"):
        target = encoder.get_submodule("model")
        with torch.device("meta"):
            classifier = set(timm.create_model(name[3:], pretrained=False).state_dict())
    wanted = target.state_dict()
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}
    state = fitting_state(wanted, read_state_dict(path), path, name, unused=classifier, optional=counters)
    nn.Module.load_state_dict(target, state, strict=False)
