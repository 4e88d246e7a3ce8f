"""What a plan says of models that see: held to real objects, and to what autograd really keeps."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel

from ft_core.config.load import check_config, load_config
from ft_core.models import find_model, pick_device
from ft_core.planning import Planner, with_memory
from ft_core.planning.blueprint import Blueprint
from ft_vision.families.parts import FAMILIES as KNOWN
from ft_vision.planning import VisionFronts, _blocks, materialize
from ft_vision.tower import LOWER, _ways, count_tower

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "gemma3", "llava")
TRAINED = {
    "the projector adapted": ("frozen", "lora", True),
    "both adapted": ("lora", "lora", True),
    "the tower whole": ("full", "frozen", True),
    "both whole": ("full", "full", True),
    "all in full": ("full", "full", False),
    "full without the tower": ("frozen", "full", False),
}


def a_config(model: Path, tower: str, projector: str, lora: bool) -> Any:
    vision = {"tower": tower, "projector": projector}
    values = {"model": str(model), "task": "vision", "data": "none.jsonl", "output": "none", "vision": vision}
    return check_config({**values, "lora": {"r": 4} if lora else None, "max_length": 64})


def real(config: Any) -> Any:
    """The model as `ft train` makes it on a machine that computes in bfloat16."""
    from ft_core.plugins import MethodSpec, registry
    from ft_core.training.prepare import prepare_model
    from ft_core.training.wrapped import widen_whole

    device = dataclasses.replace(pick_device(), dtype="bfloat16")
    made = prepare_model(config, registry().get(MethodSpec, "sft"), find_model(config.model), device, lambda line: None)
    widen_whole(made)
    return made.train()


def really_kept(model: Any, given: dict[str, Any]) -> int:
    """Bytes that autograd saves for a tower under a CPU's autocast, weights and copies of them left out."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    copies = set()

    def is_copy(function: Any) -> bool:
        while function is not None and function.name() in ("TBackward0", "ToCopyBackward0", "ViewBackward0"):
            function = function.next_functions[0][0]
        return function is not None and type(function).__name__ == "AccumulateGrad"

    class Saved:
        def __init__(self, tensor: Any) -> None:
            self.tensor, self.place = tensor.detach(), tensor.untyped_storage().data_ptr()

    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Any) -> Saved:
        saved = Saved(tensor)
        if is_copy(tensor.grad_fn):
            copies.add(saved.place)
        alive.add(saved)
        return saved

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor),
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        torch.autocast("cpu", torch.bfloat16),
    ):
        made = plain.model.get_image_features(**given)
    made = made.pooler_output, getattr(made, "deepstack_features", None)  # what the language model is handed
    gc.collect()
    sizes = {saved.place: saved.tensor.untyped_storage().nbytes() for saved in alive}
    del made
    return sum(size for place, size in sizes.items() if place not in own | copies)


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in FAMILIES for how in ("both adapted", "both whole", "all in full")]
    + [("qwen3_vl", how) for how in ("the projector adapted", "the tower whole", "full without the tower")],
)
def test_what_is_kept_is_what_autograd_keeps(name: str, how: str, family: Callable[[str], Path]) -> None:
    """To the byte, under a CPU's autocast, which computes norms in the format that they are given."""
    config = a_config(family(name), *TRAINED[how])
    fronts = VisionFronts(config, find_model(config.model))
    front = fronts(config)
    with torch.device("meta"):
        bare = fronts.auto.from_config(copy.deepcopy(fronts._config), dtype=torch.bfloat16)
    made = materialize(bare, front.frozen, front.whole, config.lora, fronts.modules)
    grids = KNOWN[name].has_grids
    (given, *_) = _ways(bare.config.vision_config, grids, getattr(bare.config.vision_config, "image_size", None))
    counted = count_tower(made, grids, None, LOWER, ())
    kept = really_kept(real(config), given)
    assert counted.kept == kept
    assert kept > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tower_of_many_layers_is_counted_by_three(name: str, family: Callable[[str], Path]) -> None:
    """Images of one size are counted with two and three layers; as with all of them."""
    config = a_config(family(name), "lora", "lora", True)
    fronts = VisionFronts(config, find_model(config.model))
    front = fronts(config)
    deep = copy.deepcopy(fronts._config)
    key = "depth" if hasattr(deep.vision_config, "depth") else "num_hidden_layers"
    setattr(deep.vision_config, key, 5)
    counted = []
    for split in (False, True):
        with torch.device("meta"):
            bare = fronts.auto.from_config(copy.deepcopy(deep), dtype=torch.bfloat16)
        made = materialize(bare, front.frozen, front.whole, config.lora, fronts.modules)
        counted.append(count_tower(made, KNOWN[name].has_grids, _blocks(made, fronts._tower) if split else None))
    assert counted[0] == counted[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_that_is_computed_again_keeps_its_input(name: str, family: Callable[[str], Path]) -> None:
    """Two layers more keep two inputs more; without, far more."""
    config = a_config(family(name), "lora", "lora", True)
    kept: dict[tuple[int, bool], int] = {}
    vision = VisionFronts(config, find_model(config.model))._config.vision_config
    key = "depth" if hasattr(vision, "depth") else "num_hidden_layers"
    for depth in (3, 5):
        fronts = VisionFronts(config, find_model(config.model))
        setattr(fronts._config.vision_config, key, depth)
        for again in (False, True):
            counted, _, layers = fronts._count((), (), config.lora.model_dump_json(), again)
            assert layers == depth
            kept[depth, again] = counted.kept
    patches = counted.patches + (name == "llava")  # and the token that stands for the whole image
    itemsize = 4 if name == "llava" else 2  # CLIP's norm before its layers leaves 32 bits
    assert kept[5, True] - kept[3, True] == 2 * patches * vision.hidden_size * itemsize
    assert kept[5, False] - kept[3, False] > 8 * (kept[5, True] - kept[3, True])


def test_a_tower_is_computed_again_where_that_is_asked_for_or_nothing_fits_without(ft: Any, tmp_path: Path) -> None:
    """A tower of Qwen3-VL-2B's width; only its configuration is there."""
    import transformers as t

    text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 4, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 6, "num_heads": 16, "out_hidden_size": 2048}
    folder = tmp_path / "model"
    t.Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [1, 3]}).save_pretrained(
        folder
    )
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    lora = {"tower": "lora", "projector": "lora"}
    path = write_plan(tmp_path, folder, rows, max_length=4096, vision=lora, training={"batch_size": 2})
    free, asked = planned(ft, path), planned(ft, path, "activations=recompute")
    between = (free["memory"]["peak"] + asked["memory"]["peak"]) // 2**21
    bound = planned(ft, path, f"memory={between}MiB")
    assert [one["tower_again"] for one in (free, asked, bound)] == [False, True, True]
    # of 32768 patches and 6 layers each layer's input is left, of many times as much
    inputs = 32768 * 6 * 1024 * 2
    assert free["memory"]["peak"] - asked["memory"]["peak"] > 10 * inputs
    assert asked["memory"]["parts"]["activations kept"] > inputs
    assert bound["memory"]["peak"] <= bound["memory"]["limit"] < free["memory"]["peak"]
    assert asked["time"]["micro_batch"]["vision tower"] > free["time"]["micro_batch"]["vision tower"]
    assert "those of the vision tower computed again" in ft("plan", path, "--gpu", "H200", "activations=recompute").out
    # a tower that is frozen keeps nothing that could be computed again
    frozen = planned(ft, path, "activations=recompute", "vision.tower=frozen", "vision.projector=frozen")
    assert not frozen["tower_again"]
    assert frozen["memory"]["peak"] < asked["memory"]["peak"]


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_training_computes_the_tower_again(
    name: str, configure: Any, ft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the fast layers, with the kernels' references in their places: to the same losses."""
    from ft_core.models import device, loading
    from ft_core.training import run, speed

    pick = device.pick_device
    for module in (run, loading):
        monkeypatch.setattr(module, "pick_device", lambda: dataclasses.replace(pick(), dtype="float32"))
    monkeypatch.setattr(speed, "runs_kernels", lambda device: True)
    found, computed = [], []
    for activations in ("keep", "recompute"):
        output = tmp_path / activations
        config = configure(
            name, output=str(output), activations=activations, vision={"tower": "lora", "projector": "lora"}
        )
        calls: list[int] = []
        once = torch.utils.checkpoint.checkpoint
        monkeypatch.setattr(
            torch.utils.checkpoint,
            "checkpoint",
            lambda *a, calls=calls, once=once, **k: calls.append(1) or once(*a, **k),
        )
        made = ft("train", config)
        assert made.code == 0, made.err
        monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", once)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        found.append([row["loss"] for row in rows if row["kind"] == "train"])
        computed.append(len(calls))
    assert found[0] == found[1]
    assert computed[0] == 0
    assert computed[1] >= 2 * 3  # each of two layers in each of three steps


@pytest.mark.parametrize("how", ["both adapted", "both whole", "all in full", "full without the tower"])
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_what_is_trained_is_what_the_training_trains(name: str, how: str, family: Callable[[str], Path]) -> None:
    """Numbers and bytes of the weights and of what is trained, as of the real object."""
    config = a_config(family(name), *TRAINED[how])
    source = find_model(config.model)
    fronts = VisionFronts(config, source)
    planner = Planner(Blueprint.of(source, "language-model", fronts.auto, fronts.modules), 2**30, fronts=fronts)
    outline, model = planner.outline(config), real(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(outline.all) == sorted(p.numel() for p in trained)
    peak = planner.peak(config, with_memory(None, 2**34)).parts
    bytes_trained = sum(p.numel() * p.element_size() for p in trained)
    assert 2**25 + peak["weights"] + peak.get("adapters", 0) + peak.get("trained whole", 0) == 2**25 + sum(
        p.numel() * p.element_size() for p in model.parameters()
    )
    assert config.lora is None or peak.get("adapters", 0) + peak.get("trained whole", 0) == bytes_trained
    assert peak["optimizer"] > 0


def write_plan(tmp_path: Path, model: Path, rows: list[Any] | None = None, **changes: Any) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or ()))
    values = {
        "model": str(model),
        "task": "vision",
        "data": str(tmp_path / "rows.jsonl"),
        "max_length": 256,
        "output": str(tmp_path / "run"),
        **changes,
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def planned(ft: Any, path: Path, *words: str) -> dict[str, Any]:
    done = ft("plan", path, "--gpu", "H200", "--json", *words)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_a_plan_counts_images_in_the_data(ft: Any, family: Callable[[str], Path], digits: Any, tmp_path: Path) -> None:
    """The share of images among the tokens, and the rows that they are packed into, as training makes them."""
    rows = digits(32)
    plan = planned(ft, write_plan(tmp_path, family("qwen3_vl"), rows, training={"max_steps": None}))
    # each row: 4 tokens of the image, two around it, and the words
    assert any("of a row's tokens, as in the first 32 rows" in note for note in plan["notes"])
    (share,) = (
        int(found[1]) for note in plan["notes"] if (found := re.match(r"images are assumed to be (\d+)%", note))
    )
    assert 5 <= share <= 30
    assert "32 rows packed into about" in plan["counted"]
    assert "tokens each" in plan["counted"]
    # a pixel is 4 bytes; an image of 56 x 56 has 3 x 2 x 56 x 56 numbers and 4 tokens (two frames of itself)
    tokens = 2 * 256
    images = tokens * share / 100 / 4
    assert plan["memory"]["parts"]["images"] == pytest.approx(images * 3 * 2 * 56 * 56 * 4, rel=0.2)


def test_a_plan_of_a_config_alone(ft: Any, family: Callable[[str], Path], digits: Any, tmp_path: Path) -> None:
    """Where there is no processor all tokens are taken for images; the steps are not known then."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(family("gemma3") / "config.json", bare)
    path = write_plan(tmp_path, bare, digits(4))
    frozen = planned(ft, path)
    assert "images are assumed to be 100% of a row's tokens" in frozen["notes"]
    assert (frozen["steps"], frozen["counted"]) == (None, "the tokens of the data's images are not counted here")
    kept = {}
    for how in ("frozen", "lora", "full"):
        plan = planned(ft, path, f"vision.tower={how}")
        kept[how] = plan["memory"]["parts"]["activations kept"]
        assert plan["time"]["micro_batch"]["vision tower"] > 0
    assert kept["frozen"] < kept["lora"]
    assert kept["frozen"] < kept["full"]
    # an image of 56 x 56 is four tokens, its pixels three numbers of 4 bytes each
    assert frozen["memory"]["parts"]["images"] == 2 * 256 // 4 * 56 * 56 * 3 * 4


def test_a_bench_of_images(ft: Any, configure: Any, tmp_path: Path) -> None:
    config = configure("gemma3", training={"batch_size": 2})
    before = set(tmp_path.rglob("*"))
    done = ft("bench", config, "--steps", "2", "--json")
    assert done.code == 0, done.err
    timing = json.loads(done.out)
    assert set(timing["seconds"]) == {"data", "forward", "backward", "optimizer"}
    assert timing["tokens"] > 8
    assert timing["seconds"]["backward"] > 0
    assert set(tmp_path.rglob("*")) == before


def test_a_model_of_text_is_no_plan_of_images(ft: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32}))
    done = ft("plan", write_plan(tmp_path, tmp_path, [{"messages": []}]), "--gpu", "H200")
    assert done.code == 2
    assert done.err.count("\n") == 1


def test_a_training_on_a_gpu_plans_with_the_tower(
    family: Callable[[str], Path], digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the card itself is real: there is none here."""
    from ft_core import planning
    from ft_core.models import Device
    from ft_core.training.speed import foresee

    monkeypatch.setattr(planning, "card_here", lambda: planning.find_card("H100"))
    device = Device("cuda", "H100", "bfloat16", 80 * 2**30, 79 * 2**30)
    found = []
    for tower in ("frozen", "full"):
        path = write_plan(tmp_path, family("qwen3_vl"), digits(4), vision={"tower": tower})
        config = load_config(path)
        said: list[str] = []
        plan = foresee(config, find_model(config.model), device, said.append)
        assert plan is not None
        assert len(said) == 1
        found.append(plan.peak.parts)
    assert found[0]["activations kept"] < found[1]["activations kept"]
    assert found[0]["weights"] == found[1]["weights"]
    assert found[1]["trained whole"] > 0
