"""Private names of libraries that the package uses: if a library renames a method, our override is silently ignored."""

import inspect
import pkgutil
from argparse import ArgumentParser, HelpFormatter
from importlib import import_module

import evaluate
import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DynamicCache, EncoderDecoderCache, HfArgumentParser, PreTrainedModel, Trainer
from transformers.generation import GenerationMixin
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils.hub import PushInProgress

import blip_ft

# class of a library -> its methods that we override or call -> their parameters
METHODS = {
    Trainer: {
        "_clip_grad_norm": ["model"],
        "_finish_current_push": [],
        "_get_grad_norm": ["model", "grad_norm"],
        "_get_num_items_in_batch": ["batch_samples", "device"],
        "_get_output_dir": ["trial"],
        "_get_train_sampler": ["train_dataset"],
        "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
        "_load_optimizer_and_scheduler": ["checkpoint"],
        "_load_rng_state": ["checkpoint"],
        "_move_model_to_device": ["model", "device"],
        "_prepare_inputs": ["inputs"],
        "_push_from_checkpoint": ["checkpoint_folder"],
        "_run_epoch": [
            *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
            *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
            "steps_trained_in_current_epoch",
        ],
        "_save": ["output_dir", "state_dict"],
        "_save_checkpoint": ["model", "trial"],
        "_save_optimizer_and_scheduler": ["output_dir"],
        "save_model": ["output_dir", "_internal_call"],
    },
    GenerationMixin: {
        "_expand_inputs_for_generation": ["expand_size", "is_encoder_decoder", "input_ids", "model_kwargs"]
    },
    PreTrainedModel: {"_init_weights": ["module"]},
    HfArgumentParser: {"_add_dataclass_arguments": ["dtype"]},
    HelpFormatter: {"_format_action_invocation": ["action"]},
    PeftModel: {"_get_base_model_class": ["is_prompt_tuning"]},
    evaluate.Metric: {"_info": [], "_compute": ["predictions", "references", "kwargs"]},
}


def parameters_of(method) -> set[str]:
    return set(inspect.signature(method).parameters)


@pytest.mark.parametrize(("library_class", "name"), [(one, name) for one, names in METHODS.items() for name in names])
def test_private_method_has_the_parameters_that_we_expect(library_class, name):
    assert list(inspect.signature(getattr(library_class, name)).parameters)[1:] == METHODS[library_class][name]


def test_private_methods_that_we_override_are_listed_and_have_as_many_parameters():
    listed = {name for names in METHODS.values() for name in names}
    found = set()
    for module in pkgutil.walk_packages(blip_ft.__path__, "blip_ft."):
        for our_class in vars(import_module(module.name)).values():
            if not inspect.isclass(our_class) or our_class.__module__ != module.name:
                continue
            bases = [base for base in our_class.__mro__ if not base.__module__.startswith("blip_ft")]
            for name, ours in vars(our_class).items():
                theirs = next((vars(base)[name] for base in bases if name in vars(base)), None)
                if name.startswith("_") and not name.startswith("__") and inspect.isfunction(theirs):
                    found.add(name)
                    ours, theirs = parameters_of(ours), parameters_of(theirs)
                    assert "kwargs" in ours | theirs or len(ours) == len(theirs), name
    assert found <= listed, "add them to METHODS"
    assert len(found) > 10


def test_private_attributes_exist():
    assert "self._train_batch_size = " in inspect.getsource(Trainer.__init__)
    assert "if self._created_lr_scheduler:" in inspect.getsource(Trainer)
    assert "self.push_in_progress = " in inspect.getsource(Trainer.init_hf_repo) and PushInProgress().jobs == []
    assert DataLoaderShard([1]).base_dataloader is not None
    assert TensorBoardCallback().tb_writer is None
    for callback, name in ((WandbCallback, "_wandb"), (TrackioCallback, "_trackio")):
        assert f"self.{name} = {name[1:]}" in inspect.getsource(callback)
    assert issubclass(LoraLayer, BaseTunerLayer)
    assert {"_option_string_actions", "_actions"} <= vars(ArgumentParser()).keys()
    assert isinstance(PreTrainedModel._no_split_modules, set | list | None)
    assert "_parameters" in vars(torch.nn.Module()) and torch._inductor.list_mode_options()


def test_caches_have_the_attributes_that_attention_reads():
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    cache.self_attention_cache.update(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), 0)
    assert cache.self_attention_cache.layers[0].keys.shape == cache.self_attention_cache.layers[0].values.shape
    assert cache.is_updated == {} and cache.cross_attention_cache.layers == []
    # called under this name if a model has it
    assert "self._reorder_cache(model_kwargs[cache_key], beam_idx)" in inspect.getsource(GenerationMixin)
