"""A run that is evaluated at its checkpoints."""

import json
from pathlib import Path

import torch

from diffusers_cogvideox import CogVideoXPipeline
from diffusers_cogvideox.evaluation.while_training import evaluate_checkpoints
from diffusers_cogvideox.training.config import DataOptions, Stage, TrainConfig
from diffusers_cogvideox.training.loop import run
from diffusers_cogvideox.training.transformer import TransformerTask


def test_checkpoints_are_evaluated_with_averaged_weights(tmp_path: Path, parts: dict[str, str], tiny_model: dict[str, object]) -> None:
    config = TrainConfig(
        task="transformer",
        output=str(tmp_path),
        model=tiny_model,
        stages=[Stage(steps=2, batch_size=2, frames=9)],
        data=DataOptions(height=32, width=32, clips=2),
        checkpoint_every=1,
        **parts,
    )
    task, seen = TransformerTask(config), []
    evaluate = evaluate_checkpoints(tmp_path, prompts=2, scheduler={}, **parts)

    def watched(step: int, model: torch.nn.Module) -> None:
        evaluate(step, model)
        saved = CogVideoXPipeline.from_pretrained(tmp_path / "pipeline").transformer.state_dict()
        seen.append(step)
        assert not model.training
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(saved[name].float(), tensor, atol=1e-3, rtol=1e-3)  # stored in half precision

    run(config, task, watched)
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert seen == [line["step"] for line in lines] == [1, 2]
    assert all(line["prompts"] == 2 and 0 <= line["color"] <= 1 for line in lines)
    assert {path.name for path in (tmp_path / "evaluations").iterdir()} == {
        f"step-{step}.{kind}" for step in (1, 2) for kind in ("json", "png")
    }
    assert task.transformer.training
