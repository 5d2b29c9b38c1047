"""Text-prompted teachers, and the way from photos without any label to a student: tiny random networks, published as on the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from mgd_pipeline.caches.format import fingerprint
from mgd_pipeline.caches.provenance import expected_provenance, in_names_of
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.data.classes import check_classes_of
from mgd_pipeline.data.images import read_raw_mask
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.data.shapes import write_shapes
from mgd_pipeline.errors import ParamsError, WeightsError
from mgd_pipeline.networks.weights import read_metadata, read_state_dict, save_weights, sha256_of_state
from mgd_pipeline.params import PromptsTeacher, ShapesData, TargetsParams, TransformersTeacher
from mgd_pipeline.params_file import parse_params
from mgd_pipeline.teachers.fetching import check_published, fetch_teacher
from mgd_pipeline.teachers.kinds import build_teacher, prompts
from mgd_stages.cli import app
from mgd_stages.doctor.targets import weights as doctor_of_weights
from mgd_stages.projects.init import init_project
from mgd_stages.projects.presets import preset
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.evaluate import evaluate
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher

transformers: Any = pytest.importorskip("transformers")  # an extra
CPU = torch.device("cpu")
CLASSES = ("rest", "road", "car")
PROMPTS = {"rest": [], "road": ["road", "asphalt"], "car": ["a red car"]}
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
VOCABULARY = {token: i for i, token in enumerate([*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<start>", "<end>"])}
ENDS: dict[str, Any] = {"bos_token_id": VOCABULARY["<start>"], "eos_token_id": VOCABULARY["<end>"]}


def write_tokenizer(folder: Path) -> None:
    """CLIP's, of letters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = {"bos_token": "<start>", "eos_token": "<end>", "unk_token": "<end>", "pad_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **tokens}))


def clipseg(folder: Path) -> Any:
    """With a processor of older versions, whose images are larger than the ones of the configuration, as the published ones."""
    write_tokenizer(folder)
    layers: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = {**layers, **ENDS, "vocab_size": len(VOCABULARY), "num_hidden_layers": 1, "max_position_embeddings": 24}
    vision = {**layers, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    decoder: dict[str, Any] = {"reduce_dim": 8, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    config = transformers.CLIPSegConfig(
        text_config=text, vision_config=vision, projection_dim=16, extract_layers=[0, 1, 2], **decoder
    )
    model = transformers.CLIPSegForImageSegmentation(config).eval()
    with torch.no_grad():  # one answer for a patch, so that outputs can be compared at other places
        weight = model.decoder.transposed_convolution.weight
        weight.copy_(weight.mean((2, 3), keepdim=True).expand_as(weight) * 8)
    model.save_pretrained(folder)
    input_of = {"do_normalize": True, "do_resize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1], "size": 64}
    (folder / "preprocessor_config.json").write_text(json.dumps({"feature_extractor_type": "ViTFeatureExtractor", **input_of}))
    return model


def sam3(folder: Path) -> Any:
    """As facebook/sam3: a tracker of videos that contains the network."""
    write_tokenizer(folder)
    layers: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2}
    few: dict[str, Any] = {**layers, "num_layers": 1, "intermediate_size": 16}
    text = {**layers, **ENDS, "vocab_size": len(VOCABULARY), "num_hidden_layers": 1, "max_position_embeddings": 32}
    vit = {**layers, "model_type": "sam3_vit_model", "num_hidden_layers": 2, "intermediate_size": 32, "image_size": 56}
    vit |= {"pretrain_image_size": 56, "patch_size": 14, "window_size": 2, "global_attn_indexes": [1]}
    model = transformers.Sam3Model(
        transformers.Sam3Config(
            vision_config={"backbone_config": vit, "fpn_hidden_size": 16, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
            text_config={**text, "intermediate_size": 32, "projection_dim": 16},
            geometry_encoder_config=few,
            detr_encoder_config=few,
            detr_decoder_config={**few, "num_queries": 4},
            mask_decoder_config={**layers, "num_upsampling_stages": 2},
        )
    ).eval()
    save_weights(folder / "model.safetensors", {f"detector_model.{key}": value for key, value in model.state_dict().items()}, {})
    video = {"model_type": "sam3_video", "architectures": ["Sam3VideoModel"], "detector_config": model.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(video))
    images = transformers.Sam3ImageProcessor(size={"height": 56, "width": 56})
    transformers.Sam3Processor(images, transformers.AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return model


NETWORKS = {"clipseg": clipseg, "sam3": sam3}


def words(**changes: Any) -> PromptsTeacher:
    return PromptsTeacher(**{"prompts": PROMPTS, "transformers": "published", "weights": "words.safetensors", **changes})


def fetched(base: Path, network: Callable[[Path], Any] = clipseg, **changes: Any) -> tuple[PromptsTeacher, Any]:
    """A teacher whose source is gone, and the published network."""
    torch.manual_seed(0)
    model, params = network(base / "published"), words(**changes)
    fetch_teacher("words", params, base)
    shutil.rmtree(base / "published")
    return params, model


def answers_of(model: Any, images: torch.Tensor, phrase: str) -> torch.Tensor:
    """(B, h, w) answers of a network of transformers for one phrase, with the padding of its published processor."""
    ids = [VOCABULARY["<start>"]]
    for word in phrase.split():
        ids += [*(VOCABULARY[letter] for letter in word[:-1]), VOCABULARY[f"{word[-1]}</w>"]]
    ids.append(VOCABULARY["<end>"])
    padding = 24 - len(ids)
    text = {
        "input_ids": torch.tensor([ids + [VOCABULARY["<end>"]] * padding] * len(images)),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * padding] * len(images)),
    }
    outputs = model(pixel_values=images, **text)
    return outputs.logits if hasattr(outputs, "conditional_embeddings") else outputs.semantic_seg[:, 0]


@pytest.mark.parametrize("kind", NETWORKS)
@torch.inference_mode()
def test_a_class_has_the_largest_score_of_its_phrases_and_the_rest_what_is_left(kind: str, tmp_path: Path) -> None:
    params, model = fetched(tmp_path, NETWORKS[kind])
    teacher = build_teacher("words", params, CLASSES, tmp_path)
    assert teacher.labels == CLASSES and teacher.groups is None and not teacher.align_corners
    mean, std = ((127.5, 102, 76.5), (51, 51, 25.5)) if kind == "clipseg" else ((127.5,) * 3, (127.5,) * 3)
    assert np.allclose(teacher.normalisation[:2], [mean, std], rtol=1e-6)
    side = {"clipseg": 64, "sam3": 56}[kind]
    images = torch.randn(2, 3, side, side)
    calls: list[int] = []
    vision = {"clipseg": "model.clip.vision_model", "sam3": "model.vision_encoder"}[kind]
    teacher.network.get_submodule(vision).register_forward_hook(lambda *_: calls.append(1))
    logits, features = teacher.network(images)
    assert len(calls) == 1, "the image is encoded once for all phrases"
    assert features is None and logits.isfinite().all()
    road, asphalt, car = (answers_of(model, images, phrase).sigmoid() for phrase in ("road", "asphalt", "a red car"))
    assert float((road - asphalt).abs().max()) > 1e-4, "phrases differ"
    scores = torch.stack([1 - torch.stack([road, asphalt, car]).amax(0), torch.maximum(road, asphalt), car], 1)
    assert torch.allclose(logits.exp(), scores, atol=1e-5)
    first, second = scores.topk(2, dim=1).values.unbind(1)
    clear = first - second > 1e-4
    assert clear.float().mean() > 0.8 and torch.equal(logits.argmax(1)[clear], scores.argmax(1)[clear])

    # Without a class of no phrase there is no background; the same phrases of other classes are other channels.
    changed = words(prompts={"rest": ["a red car"], "road": ["road"], "car": ["asphalt"]})
    other = build_teacher("words", changed, CLASSES, tmp_path).network(images).logits
    assert torch.allclose(other.exp(), torch.stack([car, road, asphalt], 1), atol=1e-5)

    # An input of any size is seen as a whole at the size of the network.
    wide = torch.randn(1, 3, 40, 90)
    resized = torch.nn.functional.interpolate(wide, (side, side), mode="bilinear", antialias=True)
    assert torch.allclose(teacher.network(wide).logits, teacher.network(resized).logits, atol=1e-5)


def test_logits_are_finite_whatever_the_network_answers(tmp_path: Path) -> None:
    params, _ = fetched(tmp_path)
    network: Any = build_teacher("words", params, CLASSES, tmp_path).network
    for answer in (-1e4, 1e4):
        network._answers = lambda model, images, tokens, answer=answer: torch.full((1, len(tokens), 2, 2), answer)
        logits = network(torch.zeros(1, 3, 8, 8)).logits
        assert logits.isfinite().all() and bool((logits[:, 0].argmax() == 0) and (logits[:, 0] > logits[:, 1]).all()) == (
            answer < 0
        )


def test_weights_of_half_precision_are_used_in_float32(tmp_path: Path) -> None:
    params, _ = fetched(tmp_path, lambda folder: clipseg(folder).half().save_pretrained(folder))
    teacher = build_teacher("words", params, CLASSES, tmp_path)
    assert {value.dtype for value in teacher.network.parameters()} == {torch.float32}
    assert teacher.network(torch.zeros(1, 3, 64, 64)).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({**PROMPTS, "car": []}, "rest and car have no phrase; one class can be everything that no phrase names"),
        ({**PROMPTS, "car": ["road"]}, "the phrase 'road' stands twice (of road and of car)"),
        ({**PROMPTS, "car": ["car", "car"]}, "the phrase 'car' stands twice (of car)"),
        ({**PROMPTS, "car": [" "]}, "car: ' ' is no phrase"),
        ({"rest": []}, "no class has a phrase"),
    ],
)
def test_prompts_that_cannot_be_meant_are_one_line(prompts: dict[str, list[str]], said: str) -> None:
    raw = preset("folder", "photos", "1/1", {"classes": list(CLASSES)}).model_dump()
    raw["teachers"]["words"] = {"prompts": prompts, "transformers": "CIDAS/clipseg-rd64-refined", "weights": "words.safetensors"}
    with pytest.raises(ParamsError) as caught:
        parse_params(raw)
    assert f"teachers.words.prompts: {said}" in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_of_other_classes_are_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    for classes, said in (
        (("rest", "roads", "car"), "teachers.words.prompts: 'road' is no class of the data set; nearest is 'roads'"),
        ((*CLASSES, "sky"), r"teachers.words.prompts: says nothing of sky; write the phrases of each class, such as sky: \[sky\]"),
    ):
        with pytest.raises(ParamsError, match=said):
            check_classes_of("teachers.words", words(), classes)
        raw = preset("folder", "photos", "1/1", {"classes": list(classes)}).model_dump()
        raw["teachers"]["words"], raw["train_teachers"] = words().model_dump(), ["words"]
        project = Project(tmp_path, parse_params(raw))
        for stage in (lambda: train_teacher(project, "words", Machine(CPU)), lambda: prepare_data(project)):  # noqa: B023
            with pytest.raises(ParamsError, match=said):
                stage()
        checks = [str(check) for check in doctor_of_weights(project, None, partition=False)]
        assert any("teachers.words.prompts: " in check for check in checks)


def test_what_cannot_be_a_text_prompted_teacher_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    clipseg(tmp_path / "published")
    check_published("words", words(), tmp_path)

    def refused(said: str, **changes: Any) -> None:
        with pytest.raises(WeightsError, match=said):
            fetch_teacher("words", words(**changes), tmp_path)
        assert not (tmp_path / "words.safetensors").exists()

    refused(
        r"teachers\.words\.prompts: 'a+' has 30 tokens, and the network takes 24; shorten it", prompts={"a": ["a" * 28], "b": []}
    )
    refused(
        r"teachers\.words\.prompts: 'Red  car' of a and 'red car' of b are the same words to the network; write other words",
        prompts={"a": ["road", "Red  car"], "b": ["red car"]},
    )
    refused("hf download CIDAS/none --local-dir FOLDER", transformers="CIDAS/none")
    with pytest.raises(WeightsError, match=r"is a CLIPSegForImageSegmentation, not a network .*; it takes phrases: add prompts"):
        fetch_teacher("words", TransformersTeacher(transformers="published", weights="words.safetensors"), tmp_path)
    small: dict[str, Any] = {"hidden_sizes": [8] * 4, "depths": [1] * 4}
    transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**small)).save_pretrained(tmp_path / "other")
    refused("other is a SegformerForSemanticSegmentation, which takes no phrases; name a CLIPSeg or SAM 3", transformers="other")
    with pytest.raises(WeightsError, match="which takes no phrases"):
        check_published("words", words(transformers="other"), tmp_path)
    monkeypatch.setitem(prompts._NETWORKS, "clipseg", "Sam9Model")
    refused("published is a Sam9Model, which the installed version does not have")
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "published/preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": {"height": 64, "width": 96}}))
    refused(r"its processor makes images of .*, not squares of one size")


def test_a_phrase_that_the_file_does_not_have_is_fetched_again(tmp_path: Path) -> None:
    params, _ = fetched(tmp_path)
    with pytest.raises(WeightsError, match=r"made without the phrase 'lane'; fetch it again by `mgd-pipeline train-teacher"):
        build_teacher("words", words(prompts={**PROMPTS, "road": ["road", "lane"]}), CLASSES, tmp_path)
    build_teacher("words", words(prompts={**PROMPTS, "road": ["road"]}), CLASSES, tmp_path)  # fewer phrases are there
    assert read_metadata(tmp_path / "words.safetensors")["tokens"].keys() == {"road", "asphalt", "a red car"}
    save_weights(tmp_path / "words.safetensors", {"a": torch.zeros(1)}, {"kind": "transformers"})
    with pytest.raises(WeightsError, match="holds no text-prompted network; make such a file of published by `mgd-pipeline train"):
        build_teacher("words", params, CLASSES, tmp_path)


def test_the_input_size_and_the_tokens_are_part_of_the_hash_of_the_weights(tmp_path: Path) -> None:
    params, _ = fetched(tmp_path)
    path = tmp_path / "words.safetensors"
    state, notes = read_state_dict(path), read_metadata(path)

    def hash_with(**changes: Any) -> str:
        save_weights(path, state, {**notes, **changes})
        return sha256_of_state(build_teacher("words", params, CLASSES, tmp_path).network.state_dict())

    tokens = {**notes["tokens"], "road": notes["tokens"]["asphalt"]}
    assert len({hash_with(), hash_with(size=[96, 96]), hash_with(tokens=tokens)}) == 3 and hash_with() == hash_with()


def test_prompts_are_part_of_a_teacher_caches_identity_and_names_of_classes_are_not() -> None:
    targets = TargetsParams()
    made = expected_provenance(words(), targets, CLASSES, None)
    other = expected_provenance(words(prompts={**PROMPTS, "road": ["road"]}), targets, CLASSES, None)
    assert made["teacher"]["prompts"] == PROMPTS and fingerprint(made) != fingerprint(other)
    renamed = {"rest" if name == "rest" else name.upper(): phrases for name, phrases in PROMPTS.items()}
    now = expected_provenance(words(prompts=renamed), targets, ("rest", "ROAD", "CAR"), None)
    assert fingerprint(in_names_of(made, now)) == fingerprint(made)


def without_labels(tmp_path: Path) -> Path:
    """A folder of 24 photos, all in images/."""
    made = ShapesData(dataset="shapes", root="shapes", partition="1/1", height=48, width=64, train=24, val=1, test=1)
    write_shapes(made, tmp_path / "shapes", lambda done, total: None)
    shutil.move(tmp_path / "shapes/images/train", tmp_path / "photos/images")
    return tmp_path / "photos"


def correct(mask: Path, value: int) -> None:
    """As programs do that keep the notes of a file."""
    with Image.open(mask) as drawn:
        drawn.paste(value, (0, 0, *drawn.size))
        notes = PngInfo()
        for key in ("Software", "Pixels CRC32"):
            notes.add_text(key, drawn.info[key])
        drawn.save(mask, pnginfo=notes)


def test_from_photos_without_any_label_to_a_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """init, train-teacher, label-images, a person who corrects a mask, and the stages as with any other masks."""
    torch.manual_seed(1)
    clipseg(tmp_path / "clipseg")
    root = without_labels(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError, match=r"and no labels; .*; or let a text-prompted .* into photos/images and name the classes"):
        init_project(None, Path("photos"), None, Path("project"), preset_name="quick")
    with pytest.raises(ParamsError, match="--hours: measures trainings, and there are no labels"):
        init_project(None, root, None, Path("project"), classes="background,red_car", sized=lambda params: (params, []))
    said = init_project(None, root, None, Path("project"), preset_name="quick", classes="background,red_car,road")
    written = open_project(Path("project/params.yaml")).params.teachers["words"]
    assert isinstance(written, PromptsTeacher)
    assert written.prompts == {"background": [], "red_car": ["red car"], "road": ["road"]}
    label = "label-images data/raw/folder/images --teacher words --output data/raw/folder --overlays"
    assert [line.strip() for line in said if line.startswith("  ")] == [
        "cd project",
        "mgd-pipeline train-teacher --teacher words",
        f"mgd-pipeline {label}",
        "mgd-pipeline run",
    ]

    monkeypatch.chdir("project")
    steps = [
        "teacher_training.steps=1",
        "student.steps=2",
        "data.long_side=64",
        "views.crop=[32, 32]",
        "losses.pixel_teachers=[words]",
        "losses.image_teacher=words",
        "losses.region=0",
        "train_teachers=[words]",
        "teachers.words.transformers=../clipseg",
    ]
    project, options = open_project(Path("params.yaml"), steps), [part for step in steps for part in ("--set", step)]
    train_teacher(project, "words", Machine(CPU))
    shutil.rmtree(tmp_path / "clipseg")
    result = CliRunner().invoke(app, [*label.split(), "--confidence", "0", *options])
    assert result.exit_code == 0 and "24 masks: data/raw/folder/masks" in result.output
    masks = {path.stem: read_raw_mask(path) for path in sorted((root / "masks").glob("*.png"))}
    assert len(masks) == len(list((root / "overlays").glob("*.png"))) == 24
    assert all(mask.shape == (48, 64) for mask in masks.values()) and set(np.concatenate(list(masks.values())).flat) == {0, 1, 2}

    # A person corrects one mask with a program that keeps its notes: it is theirs now.
    corrected = sorted((root / "masks").glob("*.png"))[0]
    correct(corrected, 2)
    result = CliRunner().invoke(app, [*label.split(), "--confidence", "0", *options])
    assert result.exit_code == 0 and "23 masks:" in result.output and "1 mask is not of this program and stays" in result.output
    assert (read_raw_mask(corrected) == 2).all()

    capsys.readouterr()
    prepare_data(project)
    printed = " ".join(capsys.readouterr().out.split())
    assert "are as a network drew them, such as masks/" in printed and "overlays" not in printed
    precompute_teachers(project, "words", device=CPU)
    manifest, cache = read_manifest(project.manifest, project.base), open_cache(project.targets("words"))
    same: list[bool] = []
    for row in manifest.training:
        (number,) = cache.index.positions(row.image_id)
        (stored,) = cache.read([number]).logits
        pixels = np.linspace(0, 63, 16).round().astype(int)  # of 16 x 16 cells of the padded image
        inside = pixels[pixels < 48]
        mask = masks[Path(row.image_path).stem][inside][:, pixels]
        second, first = np.sort(stored, 0)[-2:, : len(inside)]
        clear = first - second > 2  # of 255 steps
        same += (stored.argmax(0)[: len(inside)] == mask)[clear].tolist()
    assert len(same) > 1000 and np.mean(same) > 0.95, "what is stored is what was drawn"
    train_student(project, Machine(CPU))
    evaluate(project, device=CPU)
    assert project.best_student.is_file() and "teacher words (../clipseg)" in " ".join(capsys.readouterr().out.split())


def test_pixels_that_a_teacher_is_not_sure_of_have_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched(tmp_path)
    root = without_labels(tmp_path)
    raw = preset("folder", "photos", "1/1", {"classes": list(CLASSES)}).model_dump()
    raw["teachers"]["words"], raw["teachers"]["dino"] = words().model_dump(), {"timm": "resnet10t", "weights": "dino.safetensors"}
    raw["train_teachers"] = []
    (tmp_path / "params.yaml").write_text(json.dumps(parse_params(raw).model_dump()))
    monkeypatch.chdir(tmp_path)
    photo = sorted((root / "images").iterdir())[0]

    def labelled(*options: str) -> Any:
        return CliRunner().invoke(app, ["label-images", str(photo), "--output", "out", *options])

    result = labelled("--teacher", "words", "--confidence", "1")
    assert result.exit_code == 0 and "no class 100.0 %" in result.output and "warning: no pixel of rest, road, car" in result.output
    mask = tmp_path / "out/masks" / photo.name
    assert (read_raw_mask(mask) == 255).all()
    mask.unlink()
    Image.fromarray(np.ones((48, 64), np.uint8)).save(corrected := mask.with_suffix(".tif"))
    assert "1 mask is not of this program and stays" in labelled("--teacher", "words").output
    assert [*mask.parent.iterdir()] == [corrected], "a person's mask may be of another format"
    (video := tmp_path / "drive.mp4").write_bytes(b"")
    for options, said in (
        (("--teacher", "word"), "--teacher word: must be one of"),
        (("--teacher", "words", "--set", "data.values=[0, 75, 150]"), "data.values, data.ignore: label-images writes class ids"),
        (("--teacher", "dino"), "dino.safetensors: no such file"),
        (("--teacher", "words", str(video)), f"{video}: is a video; make images of it"),
    ):
        result = labelled(*options)
        assert result.exit_code != 0 and said in result.output, result.output
