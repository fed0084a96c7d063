"""Fine-tuning BLIP: the original's loss, each image encoded once, recipes of one page."""

from blip_ft.data_pipeline import DataPipeline
from blip_ft.metrics.vqa import VqaAccuracy, vqa_accuracy
from blip_ft.modeling.adapters import count_parameters, freeze_model, unfreeze_model
from blip_ft.modeling.blip.captioning import BlipForConditionalGeneration
from blip_ft.modeling.blip.retrieval import BlipForImageTextRetrieval
from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering
from blip_ft.models import (
    ModelLoader,
    build_small_blip,
    generate_answer_blip,
    get_device,
    get_model_info,
    get_model_size_mb,
    load_model,
    load_model_from_path,
    move_model_to_device,
    prepare_inputs_for_blip,
    print_model_summary,
    save_model,
)

__all__ = [
    "BlipForConditionalGeneration",
    "BlipForImageTextRetrieval",
    "BlipForQuestionAnswering",
    "DataPipeline",
    "ModelLoader",
    "VqaAccuracy",
    "build_small_blip",
    "count_parameters",
    "freeze_model",
    "generate_answer_blip",
    "get_device",
    "get_model_info",
    "get_model_size_mb",
    "load_model",
    "load_model_from_path",
    "move_model_to_device",
    "prepare_inputs_for_blip",
    "print_model_summary",
    "save_model",
    "unfreeze_model",
    "vqa_accuracy",
]
