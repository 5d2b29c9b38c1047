"""Variants of one experiment by name: what a study changes in the parameters, and nothing else.

Your own variant is written `name: key=value key=value`, with the keys of params.yaml, and may start from known variants:
`resnet18-alone: supervised student.network.encoder=resnet18` is the twin, without teachers, of another student.
"""

from __future__ import annotations

import difflib
import re
import shlex
from dataclasses import dataclass

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import LONGEST_NAME, Params

_WEIGHTS = ("pixel", "channel", "region", "image", "feature")
"""Keys of losses that weigh what teachers say."""
_ITS_OWN = ("losses.", "targets.", "student.", "views.", "cutmix.")


@dataclass(frozen=True)
class Variant:
    name: str
    overrides: tuple[str, ...] = ()
    """As for --set: key=value."""
    supervised_only: bool = False
    live: bool = False
    """Teachers run beside the student on every view, instead of being read from teacher caches."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The overrides that ask for teacher caches of their own."""
        return tuple(override for override in self.overrides if override.startswith("targets."))


def named_variants(params: Params) -> dict[str, Variant]:
    """The variants that every study knows, for these parameters."""
    half, double = f"student.steps={max(1, params.student.steps // 2)}", f"student.steps={params.student.steps * 2}"
    raw = ("targets.logits=uint8",) if params.targets.logits == "log-probability" else ()  # what these two compare is cut off there
    no_prior = ("losses.prior_adjustment=0",) if params.losses.prior_adjustment else ()  # it needs all classes
    small = ("targets.logits=log-probability", "targets.region_embeddings=uint8", "targets.compression=zstd")
    variants = [
        Variant("supervised", supervised_only=True),
        Variant("distilled"),
        *(
            Variant(f"{only}-only", tuple(f"losses.{key}=0" for key in _WEIGHTS if key != only))
            for only in ("pixel", "region", "image")
        ),
        Variant("without-pixel", ("losses.pixel=0",)),
        Variant("without-region", ("losses.region=0",)),
        Variant("without-image", ("losses.image=0",)),
        Variant("labelled-only", ("losses.images=[labelled]",)),
        Variant("unlabelled-only", ("losses.images=[unlabelled]",)),
        Variant("hard", ("losses.pixel_labels=hard",)),
        Variant("soft", ("losses.pixel_labels=soft",)),
        Variant("ensemble", ("losses.pixel_choice=ensemble",)),
        Variant("by-class", ("losses.pixel_choice=by-class",)),
        *(Variant(distance, (f"losses.pixel_distance={distance}",)) for distance in ("kl", "dist", "cauchy-schwarz", "binary")),
        Variant("ttm", ("losses.pixel_distance=ttm", *raw)),
        Variant("channel", ("losses.channel=3", *raw)),
        Variant("region-kl", ("losses.region_distance=kl",)),
        Variant("mean-log-probability", ("losses.image_distance=log-probability",)),
        Variant("presence", ("losses.image_distance=presence",)),
        *(Variant(weight, (f"losses.pixel_weights=[{weight}]",)) for weight in ("agreement", "correct", "margin", "edges")),
        Variant("uint8", ("targets.logits=uint8",)),
        Variant("float16", ("targets.logits=float16",)),
        Variant("small", (*small, "losses.image_distance=log-probability")),
        Variant("top-1", ("targets.top_k=1", *no_prior)),
        Variant("top-3", ("targets.top_k=3", *no_prior)),
        Variant("stride-8", ("targets.stride=8",)),
        Variant("stride-16", ("targets.stride=16",)),
        Variant("regions-8", ("targets.region_stride=8",)),
        Variant("regions-4", ("targets.region_stride=4",)),
        Variant("flips", ("targets.tta={flip: true}",)),
        Variant("tta", ("targets.tta={scales: [0.75, 1.0, 1.25], flip: true}",)),
        Variant("live", live=True),
        Variant("half-length", (half,)),
        Variant("double-length", (double,)),
        Variant("mean-teacher", _mean_teacher(params), supervised_only=True),
        Variant("supervised-half-length", (half,), supervised_only=True),
        Variant("supervised-double-length", (double,), supervised_only=True),
    ]
    if giving := params.losses.feature_teachers or [name for name in params.losses.used_teachers if name not in params.heads]:
        variants.append(Variant("feature", ("losses.feature=1", f"losses.feature_teachers=[{', '.join(giving)}]")))
    if params.student.optimizer == "sgd" and params.student.momentum:
        variants += _two_momenta(params)
    if len(params.teachers) > 1:
        variants += [_without(name, params) for name in params.teachers]
    return {variant.name: variant for variant in variants}


def _mean_teacher(params: Params) -> tuple[str, ...]:
    """The student alone, which its own moving average teaches, for about as many seconds as the distilled student.

    A step shows the average all unlabelled views before they are mixed. This costs a forward pass, a third of what learning from a
    view costs.
    """
    student = params.student
    learned = student.labelled_batch + student.unlabelled_batch
    guided = student.unlabelled_batch * (2 if params.cutmix.boxes else 1)
    steps = max(1, round(student.steps * 3 * learned / (3 * learned + guided)))
    return "student.without_teachers.method=mean-teacher", f"student.steps={steps}"


def _two_momenta(params: Params) -> list[Variant]:
    """`dot`, and `dot-control`: plain SGD that weighs teachers and labels as the two momenta do in the steady state.

    There a gradient counts 1 / (1 - its momentum). So against plain SGD with momentum m, the two momenta m + d and m - d multiply
    the teachers' gradients by k = (1 - m) / (1 - m - d), and the labels' gradients and the decay by s = (1 - m) / (1 - m + d). The
    control multiplies the learning rate by s, which covers labels and weight decay, and the weights of all terms of teachers by
    k / s. A parameter with one of the two gradients, such as a projection of the feature term, differs: `dot` gives it momentum m.
    """
    m, student, losses = params.student.momentum, params.student, params.losses
    d = student.distillation_momentum or 0.75 * min(m, 1 - m)
    labels, ratio = (1 - m) / (1 - m + d), (1 - m + d) / (1 - m - d)
    weights = {key: getattr(losses, key) for key in _WEIGHTS}
    scaled = [f"losses.{key}={weight * ratio:.12g}" for key, weight in weights.items() if weight]
    rate = f"student.learning_rate={student.learning_rate * labels:.12g}"
    return [
        Variant("dot", (f"student.distillation_momentum={d:.12g}",)),
        Variant("dot-control", ("student.distillation_momentum=0", rate, *scaled)),
    ]


def _without(left_out: str, params: Params) -> Variant:
    """Terms that use the teacher `left_out` use the first other teacher instead."""
    other, losses, overrides = next(name for name in params.teachers if name != left_out), params.losses, []
    for key, names in {"pixel_teachers": losses.pixel_teachers, "region_teacher": losses.region_teacher}.items():
        overrides.append(f"losses.{key}=[{', '.join([name for name in names if name != left_out] or [other])}]")
    if left_out in losses.feature_teachers:
        others = [name for name in losses.feature_teachers if name != left_out]
        overrides.append(f"losses.feature_teachers=[{', '.join(others)}]" if others else "losses.feature=0")
    if losses.image_teacher == left_out:
        overrides.append(f"losses.image_teacher={other}")
    if "agreement" in losses.pixel_weights and left_out in losses.pixel_teachers:  # which one teacher has with nobody
        overrides.append(f"losses.pixel_weights=[{', '.join(weight for weight in losses.pixel_weights if weight != 'agreement')}]")
    return Variant(f"without-{left_out}", tuple(overrides))


def parse_variant(text: str, params: Params) -> Variant:
    """One of `named_variants`, or the user's own variant. Raises ParamsError for text that is neither."""
    known = named_variants(params)
    name, colon, overrides = text.partition(":")
    if text in known:
        return known[text]
    if colon and len(name) > LONGEST_NAME:
        raise ParamsError(f"--variant {name[:20]}...: names a folder, and has {len(name)} letters; {LONGEST_NAME} are allowed")
    try:
        if colon:
            return _own(name, shlex.split(overrides), known)
        near = difflib.get_close_matches(text, list(known), n=1)
        remedy = f"nearest is {near[0]}" if near else f"there are {', '.join(known)}"
        raise ValueError(f"unknown; {remedy}; or write one of your own as 'name: losses.pixel=0 student.steps=500'")
    except ValueError as error:
        raise ParamsError(f"--variant {text}: {error}") from None


def _own(name: str, parts: list[str], known: dict[str, Variant]) -> Variant:
    """The variant of these known variants and overrides. Raises ValueError with what is wrong."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ValueError(f"the name {name!r} names a folder; use lower-case letters, digits, . and -")
    if name in known:
        raise ValueError(f"{name} is the name of a variant that every study knows; choose another")
    starts = [known[part] for part in parts if part in known]
    changes = [part for part in parts if part not in known]
    if not changes:
        raise ValueError("changes nothing; write 'name: key=value'")
    for part in changes:
        if "=" not in part:
            raise ValueError(f"{part} is neither key=value nor a variant; there are {', '.join(known)}")
        if not part.startswith(_ITS_OWN):
            sections = ", ".join(_ITS_OWN).replace(".", "")
            raise ValueError(f"{part} would change what all runs share; change {sections}")
    supervised, live = any(start.supervised_only for start in starts), any(start.live for start in starts)
    if supervised and live:
        raise ValueError("a student without teachers has no live ones; leave out one of the two")
    return Variant(name, (*(override for start in starts for override in start.overrides), *changes), supervised, live)
