"""What the trainer sets up that no number of a short run shows."""

import pytest

from blip_ft.training.trainer import BlipTrainer


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_weight_decay_takes_biases_and_norms_too(recipe, data_of, monkeypatch, task):
    decays = {}

    def create(self, *args, run=BlipTrainer.create_optimizer, **kwargs):
        optimizer = run(self, *args, **kwargs)
        of = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
        decays.update({name: of[id(weight)] for name, weight in self.model.named_parameters() if weight.requires_grad})
        return optimizer

    monkeypatch.setattr(BlipTrainer, "create_optimizer", create)
    recipe(*data_of(task), "--weight_decay", "0.05", "--max_steps", "1", task=task)
    assert set(decays.values()) == {0.05}
    assert any(name.endswith("LayerNorm.weight") for name in decays) and any(name.endswith("bias") for name in decays)
