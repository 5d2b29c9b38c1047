"""Teachers of segmentation-models-pytorch: the kind that train-teacher trains."""

from __future__ import annotations

from pathlib import Path

from mgd_pipeline.networks.encoders import normalisation, unrecorded_normalisation
from mgd_pipeline.networks.segmentation import load_network
from mgd_pipeline.networks.weights import read_metadata, read_state_dict
from mgd_pipeline.params import SmpTeacher
from mgd_pipeline.teachers.kinds.shared import channels_of, noted_normalisation
from mgd_pipeline.teachers.teacher import Teacher


def smp_teacher(params: SmpTeacher, path: Path) -> Teacher:
    notes = read_metadata(path)
    labels = notes.get("classes")
    count = len(labels) if labels else channels_of(read_state_dict(path), "segmentation_head.0.weight", path)
    network = load_network(params, count, path)
    # Version 0.1.0 wrote notes without the input. A file without any notes is the group's own, trained as smp trains it.
    default = unrecorded_normalisation(params.encoder) if notes else normalisation(params.encoder)
    normalise = noted_normalisation(notes, default)
    return Teacher(network, normalise, align_corners=True, labels=tuple(labels) if labels else None)
