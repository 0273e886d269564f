"""SGLang driven without our engine: what it computes for rows that name adapters."""

from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from conftest import DEVICE, VOCABULARY
from peft import LoraConfig, PeftModel, get_peft_model
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from transformers import AutoModelForCausalLM

from orchestrator.runner import ALONE, Runner, World


def make_adapter(model_folder: Path, folder: Path, modules: Sequence[str], seed: int) -> PeftModel:
    """A PEFT adapter with random factors, saved to a folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(modules)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder))
    return adapted


def adapter_runner(
    model_folder: Path, adapters: Sequence[Path], modules: Sequence[str], world: World = ALONE
) -> Runner:
    """A runner that has loaded these adapters; each is known by its folder's name."""
    arguments = ServerArgs(
        model_path=str(model_folder),
        dtype="float32",
        device=DEVICE,
        tp_size=world.size,
        attention_backend="torch_native" if DEVICE == "cpu" else "triton",
        sampling_backend="pytorch",
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        max_total_tokens=256,
        mem_fraction_static=0.5,
        enable_lora=True,
        lora_backend="torch_native" if DEVICE == "cpu" else "triton",
        max_lora_rank=4,
        max_loras_per_batch=len(adapters) + 1,
        lora_target_modules=set(modules),
    )
    runner = Runner(arguments, ModelConfig.from_server_args(arguments), world)
    for adapter in adapters:
        name = adapter.name
        reference = LoRARef(lora_id=name, lora_name=name, lora_path=str(adapter), pinned=False)
        result = runner.model_runner.load_lora_adapter(reference)
        assert result.success, result.error_message
    return runner


@torch.no_grad()
def last_logits(
    runner: Runner, sequences: Sequence[Sequence[int]], adapters: Sequence[str | None]
) -> torch.Tensor:
    """Logits behind each sequence, each under its adapter, in one batch: [sequences, vocabulary].

    All slots are taken anew: the pools are cleared first.
    """
    runner.activate()
    model_runner = runner.model_runner
    model_runner.req_to_token_pool.clear()
    model_runner.token_to_kv_pool_allocator.clear()
    requests = []
    for index, (tokens, adapter) in enumerate(zip(sequences, adapters, strict=True)):
        request = Req(
            rid=str(index),
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
            lora_id=adapter,
        )
        request.init_next_round_input(None)
        request.set_extend_range(0, len(tokens))
        requests.append(request)
    pools = {
        "req_to_token_pool": model_runner.req_to_token_pool,
        "token_to_kv_pool_allocator": model_runner.token_to_kv_pool_allocator,
    }
    schedule = ScheduleBatch.init_new(
        reqs=requests,
        tree_cache=RadixCache(CacheInitParams(disable=True, page_size=1, **pools)),
        model_config=model_runner.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        **pools,
    )
    schedule.prepare_for_extend()
    if schedule.input_ids is None:
        schedule.input_ids = schedule.prefill_input_ids_cpu.to(DEVICE)
    batch = ForwardBatch.init_new(schedule, model_runner, return_hidden_states_before_norm=False)
    logits: torch.Tensor = runner.forward(batch).next_token_logits
    return logits[:, : len(VOCABULARY)].float().cpu()
