"""Teachers of every kind behind the one contract of `teachers.Teacher`: how each is built and loaded.

| kind in params.yaml | network | logits | features |
|---|---|---|---|
| decoder, encoder | segmentation-models-pytorch | native | the decoder's output |
| torchvision | its segmentation networks | native | what the last 1x1 convolution sees |
| transformers | its segmenters | native; with queries their sum | what the last 1x1 convolution sees; the pixel decoder's output |
| timm | any backbone | none | the last feature map |
| import | whatever the group's function returns | | |

A finished teacher is one weights file. Where that was made by `teacher_fetch` it holds all that is needed to build the network
again, so that stage one needs no hub. Letters: B batch, L the teacher's classes, D channels, h w cells, Q queries.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mgd_pipeline.errors import MGDError, ParamsError, WeightsError
from mgd_pipeline.networks.segmentation import (
    IMAGENET,
    MULTIPLE,
    REFUSALS,
    Fault,
    Normalisation,
    find_fault,
    fitting_state,
    load_network,
    normalisation,
    timm_normalisation,
    unrecorded_normalisation,
)
from mgd_pipeline.networks.weights import read_metadata, read_state_dict
from mgd_pipeline.params import ImportedTeacher, SmpTeacher, TeacherParams, TimmTeacher, TorchvisionTeacher, TransformersTeacher
from mgd_pipeline.teachers.teacher import Teacher, TeacherOutputs
from mgd_pipeline.words import counted

# --- building ---------------------------------------------------------------------------------------------------------


def build_teacher(name: str, params: TeacherParams, classes: Sequence[str], base: Path) -> Teacher:
    """A teacher of params.yaml in eval mode on the CPU, its weights loaded strictly, ready to speak of the data set's classes.

    `base` is the project's folder. Raises WeightsError for weights that do not fit, ParamsError for a class_map that does not.
    """
    path = base / params.weights
    match params:
        case SmpTeacher():
            teacher = _smp(params, path)
        case TorchvisionTeacher():
            teacher = _torchvision(params, path)
        case TransformersTeacher():
            teacher = _transformers(params, path)
        case TimmTeacher():
            teacher = _timm(params, path)
        case ImportedTeacher():
            teacher = _imported(name, params, path, classes, base)
    teacher.network.eval().requires_grad_(False)
    count, _ = output_channels(name, teacher)
    if count == 0:
        return replace(teacher, short_side=params.short_side)
    groups = class_groups(f"teachers.{name}", params.class_map, tuple(classes), teacher.labels, count)
    return replace(teacher, short_side=params.short_side, groups=groups)


@torch.inference_mode()
def output_channels(name: str, teacher: Teacher) -> tuple[int, int]:
    """(classes, channels of the features) as the network really gives them, 0 for what it does not give.

    Raises WeightsError for a network that gives something else, or that does not take a small input.
    """
    size = _small(teacher.multiple)
    try:
        outputs = teacher.network(torch.zeros(1, 3, *size, device=teacher.device))
    except REFUSALS as error:
        raise _cannot_see(name, Fault(size, f"{type(error).__name__}: {error}")) from error
    found = []
    for what, values in (("logits", outputs.logits), ("features", outputs.features)):
        if values is not None and (values.dim() != 4 or len(values) != 1 or not values.is_floating_point()):
            shape = tuple(values.shape)
            raise WeightsError(f"teachers.{name}: its {what} are {shape} {values.dtype}, not (B, channels, h, w) floats")
        found.append(0 if values is None else int(values.shape[1]))
    if not any(found):
        raise WeightsError(f"teachers.{name}: gives neither logits nor features")
    return found[0], found[1]


def check_sees(name: str, build: Callable[[], nn.Module], multiple: int, sizes: Sequence[tuple[int, int]]) -> None:
    """Raises WeightsError for a network that cannot be given inputs of these sizes (height, width), or a small one."""
    if fault := find_fault(build, [_small(multiple), *sizes]):
        raise _cannot_see(name, fault)


def on_meta(network: nn.Module) -> nn.Module:
    """A network that gives what this one does but without values, on the meta device; it needs no memory."""
    values = {key: value.to("meta") for key, value in (*network.named_parameters(), *network.named_buffers())}
    return _Valueless(network, values)


class _Valueless(nn.Module):
    def __init__(self, network: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self._network, self._values = [network], values  # in a list, where eval() does not find it

    def forward(self, images_B3HW: Tensor) -> TeacherOutputs:
        return torch.func.functional_call(self._network[0], self._values, (images_B3HW.to("meta"),))


def _small(multiple: int) -> tuple[int, int]:
    side = 2 * max(MULTIPLE, multiple)
    side += -side % multiple
    return side, side


def _cannot_see(name: str, fault: Fault) -> WeightsError:
    shown = "cannot be built" if fault.size is None else f"cannot see images of {fault.size[0]} x {fault.size[1]} pixels"
    return WeightsError(
        f"teachers.{name}: {shown} ({' '.join(fault.said.split())[:160]}); a teacher must take images of every size: name another "
        f"network, or wrap this one by a function that brings images to its size (import:)"
    )


def stored_channels(name: str, teacher: Teacher) -> tuple[int, int]:
    """(classes, channels of the features) of its store, 0 for what it does not give."""
    classes, features = output_channels(name, teacher)
    return (len(teacher.groups) if teacher.groups is not None else classes), features


def class_groups(
    key: str, class_map: dict[str, list[str | int]] | None, classes: tuple[str, ...], labels: tuple[str, ...] | None, count: int
) -> tuple[tuple[int, ...], ...] | None:
    """The teacher's classes behind each of the data set's, see `teachers.data_classes`; None where they are the same.

    Raises ParamsError, naming `key`, where that is not said, or said of classes that there are not.
    """
    known = labels or tuple(str(i) for i in range(count))
    if class_map is None:
        if count != len(classes) or (labels is not None and labels != classes):
            raise ParamsError(
                f"{key}.class_map: missing; this teacher has {counted(count, 'class', 'classes')} ({_some(known)}), the data "
                f"set {len(classes)} ({_some(classes)}): write for each of these what the teacher calls it"
            )
        return None
    for name in class_map:
        if name not in classes:
            raise ParamsError(f"{key}.class_map: {name!r} is no class of the data set; {_nearest(name, classes)}")
    absent = [name for name in classes if name not in class_map]
    if absent:
        raise ParamsError(f"{key}.class_map: says nothing of {_some(absent)}; write [] where the teacher has no such class")
    groups = []
    for name in classes:
        members = []
        for member in class_map[name]:
            if isinstance(member, str) and known.count(member) > 1:
                numbers = ", ".join(str(number) for number, label in enumerate(known) if label == member)
                raise ParamsError(
                    f"{key}.class_map.{name}: the teacher calls several classes {member!r}, which are its numbers {numbers}; "
                    "write the numbers that you mean"
                )
            number = known.index(member) if isinstance(member, str) and member in known else member
            if not isinstance(number, int) or not 0 <= number < count:
                remedy = _nearest(member, known) if isinstance(member, str) else f"it has 0 to {count - 1}"
                raise ParamsError(f"{key}.class_map.{name}: the teacher has no class {member!r}; {remedy}")
            members.append(number)
        groups.append(tuple(members))
    spoken = [member for group in groups for member in group]
    twice = {member for member in spoken if spoken.count(member) > 1}
    if twice:
        raise ParamsError(f"{key}.class_map: names the teacher's class {known[min(twice)]!r} twice; it can mean one thing only")
    if not spoken:
        raise ParamsError(f"{key}.class_map: names no class of the teacher's; it has {_some(known)}")
    return tuple(groups)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"nearest is {near[0]!r}" if near else f"there are {_some(known)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


# --- the kinds --------------------------------------------------------------------------------------------------------


def _smp(params: SmpTeacher, path: Path) -> Teacher:
    notes = read_metadata(path)
    labels = notes.get("classes")
    count = len(labels) if labels else _channels_of(read_state_dict(path), "segmentation_head.0.weight", path)
    network = load_network(params, count, path)
    # A file with notes but none of its input is of version 0.1.0. One without any notes is the group's own: as smp trains it.
    otherwise = unrecorded_normalisation(params.encoder) if notes else normalisation(params.encoder)
    return Teacher(network, _noted(notes, otherwise), align_corners=True, labels=tuple(labels) if labels else None)


def _torchvision(params: TorchvisionTeacher, path: Path) -> Teacher:
    from torchvision.models import get_model

    check_torchvision(params.torchvision)
    state, notes = read_state_dict(path), read_metadata(path)
    last = "classifier.low_classifier.weight" if params.torchvision.startswith("lraspp") else "classifier.4.weight"
    count = _channels_of(state, last, path)
    model = get_model(params.torchvision, weights=None, weights_backbone=None, num_classes=count)
    # The auxiliary classifier only helps while training.
    auxiliary = _suffixes(state, "aux_classifier.")
    model.load_state_dict(fitting_state(model.state_dict(), state, path, params.torchvision, unused=auxiliary))
    return Teacher(
        _BeforeClassifier(model, lambda model, images: model(images)["out"], _classifier(model, last)),
        _noted(notes, IMAGENET),
        align_corners=False,
        labels=tuple(notes["classes"]) if "classes" in notes else None,
    )


def _transformers(params: TransformersTeacher, path: Path) -> Teacher:
    transformers = import_transformers()
    state, notes = read_state_dict(path), read_metadata(path)
    if notes.get("kind") != "transformers":
        raise WeightsError(
            f"{path}: holds no network's configuration; `mgd-pipeline train-teacher` makes such a file of {params.transformers}"
        )
    if "channels" not in notes and notes["architecture"].startswith("MobileViT"):
        raise WeightsError(
            f"{path}: does not say in which order the network takes red and blue, and {notes['architecture']} takes blue first; "
            "version 0.1.0 made the file: fetch it again by `mgd-pipeline train-teacher`"
        )
    config = transformers.AutoConfig.for_model(**notes["config"])
    model = getattr(transformers, notes["architecture"])(config)
    model.load_state_dict(fitting_state(model.state_dict(), state, path, notes["architecture"]))
    return Teacher(
        segmenter(model, len(notes["classes"])), _noted(notes, IMAGENET), align_corners=False, labels=tuple(notes["classes"])
    )


def _timm(params: TimmTeacher, path: Path) -> Teacher:
    model = _backbone(params.timm)
    wanted = model.state_dict()
    with torch.device("meta"):
        head = set(timm.create_model(params.timm, pretrained=False).state_dict()) - set(wanted)
    model.load_state_dict(fitting_state(wanted, read_state_dict(path), path, params.timm, unused=head))
    return Teacher(_LastFeatures(model), timm_normalisation(params.timm), align_corners=False, multiple=_patch(model))


def check_backbone(name: str, params: TimmTeacher, sizes: Callable[[int], Sequence[tuple[int, int]]]) -> None:
    """Raises WeightsError for a model of timm that cannot give features of such inputs, ParamsError for an unknown one; `sizes` are
    those of inputs whose sides are multiples of so many pixels. No weights are read, and nothing is fetched."""
    with torch.device("meta"):
        multiple = _patch(_backbone(params.timm))
    check_sees(name, lambda: _LastFeatures(_backbone(params.timm)), multiple, sizes(multiple))


def _patch(model: nn.Module) -> int:
    """Of what the sides of the input must be multiples, pixels."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return MULTIPLE if patch is None else patch if isinstance(patch, int) else max(patch)


def _imported(name: str, params: ImportedTeacher, path: Path, classes: Sequence[str], base: Path) -> Teacher:
    module, _, function = params.import_.partition(":")
    if str(base.resolve()) not in sys.path:  # a module beside params.yaml needs no installation
        sys.path.insert(0, str(base.resolve()))
    try:
        build = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the group's module is there, and lacks one of its own
        raise ParamsError(f"teachers.{name}.import: no module {module!r}; install it, or put it beside params.yaml") from None
    if build is None:
        raise ParamsError(f"teachers.{name}.import: {module} has no {function!r}")
    teacher = build(weights=path, classes=tuple(classes), **params.options)
    if not isinstance(teacher, Teacher):
        found = type(teacher).__name__
        raise ParamsError(f"teachers.{name}.import: {params.import_} returned {found}, not mgd_pipeline.teachers.teacher.Teacher")
    if teacher.short_side is not None or teacher.groups is not None:  # a store's identity would not know of them
        raise ParamsError(
            f"teachers.{name}.import: {params.import_} sets short_side or groups; write short_side, class_map here instead"
        )
    return teacher


class _BeforeClassifier(nn.Module):
    """A segmenter that also tells what its classifier, a 1x1 convolution, saw; where that has the last word, its output is
    taken instead of what the network makes of it, which is only larger."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], classifier: nn.Module) -> None:
        super().__init__()
        self.model, self._run = model, run
        self._seen: tuple[Tensor, Tensor] | None = None
        self._last_word = isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1)
        classifier.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen = inputs[0], output

    def forward(self, images_B3HW: Tensor) -> TeacherOutputs:
        logits = self._run(self.model, images_B3HW)
        assert self._seen is not None
        (features, native), self._seen = self._seen, None
        return TeacherOutputs(native if self._last_word else logits, features)


class _Queries(nn.Module):
    """MaskFormer and its kin: a pixel's score for a class is the sum over queries of P(class | query) * P(pixel | query)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_B3HW: Tensor) -> TeacherOutputs:
        outputs: Any = self.model(pixel_values=images_B3HW)
        classes = outputs.class_queries_logits.float().softmax(-1)[..., :-1]  # without "no object"
        masks = outputs.masks_queries_logits.float().sigmoid()
        scores = torch.einsum("bql,bqhw->blhw", classes, masks)
        # Its scores are no distribution; their logarithm is a logit, up to a constant of each pixel. 1e-4 bounds it from below.
        return TeacherOutputs(scores.clamp(min=1e-4).log(), getattr(outputs, "pixel_decoder_last_hidden_state", None))


class _LastFeatures(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images_B3HW: Tensor) -> TeacherOutputs:
        found = self.model.forward_intermediates(images_B3HW, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
        return TeacherOutputs(None, found[-1])


def segmenter(model: nn.Module, count: int) -> nn.Module:
    """A model of transformers, by what it can tell."""
    if hasattr(model, "class_predictor"):
        return _Queries(model)
    convolutions = [module for key, module in model.named_modules() if isinstance(module, nn.Conv2d) and "auxiliary" not in key]
    found = [module for module in convolutions if module.out_channels == count and module.kernel_size == (1, 1)]
    if not found:
        raise WeightsError(f"{type(model).__name__}: has no 1x1 convolution to {count} classes; wrap it by a function (import:)")
    return _BeforeClassifier(model, lambda model, images: model(pixel_values=images).logits, found[-1])


def _classifier(model: nn.Module, weight: str) -> nn.Module:
    module = model.get_submodule(weight.removesuffix(".weight"))
    # LR-ASPP adds the scores of two branches: neither classifier has the last word, features are what its context branch makes.
    return model.get_submodule("classifier.cbr") if "low_classifier" in weight else module


def _backbone(name: str) -> nn.Module:
    if not timm.is_model(name.partition(".")[0]):
        raise ParamsError(f"timm: {name!r} is no model of it; `timm.list_models()` has their names")
    with torch.device("meta"):
        any_size = hasattr(timm.create_model(name, pretrained=False, num_classes=0), "dynamic_img_size")
    options: dict[str, Any] = {"dynamic_img_size": True} if any_size else {}
    return timm.create_model(name, pretrained=False, num_classes=0, **options)


def check_torchvision(name: str) -> None:
    """Raises ParamsError for a name that is no segmentation network of torchvision's."""
    from torchvision.models import list_models, segmentation

    if name not in (names := list_models(module=segmentation)):
        raise ParamsError(f"torchvision: {name!r} is no segmentation network of it; {_nearest(name, names)}")


def import_transformers() -> Any:
    """The library, which is an extra; MGDError with what installs it where it is missing."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise MGDError("transformers is not installed; run `pip install 'mgd-pipeline[hub]'`") from None
    return transformers


def _noted(notes: dict[str, Any], otherwise: Normalisation) -> Normalisation:
    if "normalisation" not in notes:
        return otherwise
    mean, std = (tuple(values) for values in notes["normalisation"])
    return Normalisation(mean, std, notes.get("channels", "RGB"))


def _channels_of(state: dict[str, Tensor], key: str, path: Path) -> int:
    """The length of a tensor, which may have a prefix before its name."""
    found = [name for name in state if name == key or name.endswith(f".{key}")]
    if not found:
        raise WeightsError(f"{path}: holds no tensor {key}; it has {_some(list(state))}")
    return len(state[found[0]])


def _suffixes(state: dict[str, Tensor], start: str) -> Collection[str]:
    """Names of tensors from `start` on, whatever stands before it."""
    return {f"{start}{after}" for name in state for before, found, after in [name.rpartition(start)] if found}
