"""Expert parallelism, applied to a plain model from outside: before, in and after `deepspeed.initialize`.

Each `layers.N.mlp` is replaced by a layer of DeepSpeed's (AutoEP inside `initialize`, from the block that
`config.expert_parallel` writes; `deepspeed.moe` before it), so everything that refers to the old layers is taken again:
the routers of the auxiliary loss, the parameters of the optimizer. A group of `ep_size` neighbouring ranks holds one
set of experts; ranks that hold the same experts average their gradients.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.module_inject import auto_ep_layer
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.moe.ep_repack import repack_expert_weights
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.ops.triton_ops import is_triton_available
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups
from torch import nn

from minimind.accelerator import compute_capability
from minimind.config.expert_parallel import uses_random_routing
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import Precision
from minimind.model import MiniMindForCausalLM
from minimind.model.config import ModelConfig
from minimind.model.kernels.apply import Kernel, on_cpu, on_gpu
from minimind.model.kernels.experts import cpu_experts
from minimind.model.moe import Experts, MoEFeedForward
from minimind.model.router import BIAS_NAME, Router
from minimind.parallel.deepspeed_moe import GateRecord, NativeExperts
from minimind.parallel.expert_names import find_part


def own_experts(whole: torch.Tensor, num_local: int) -> torch.Tensor:
    """The `num_local` experts of this rank, of the first dimension of `whole`; what is no longer stays whole."""
    num_parts = len(whole) // num_local
    place = torch.distributed.get_rank() % num_parts if num_parts > 1 else 0
    return whole[place * num_local : (place + 1) * num_local]


@contextlib.contextmanager
def only_own_experts(ep_size: int) -> Iterator[None]:
    """Models built in the block keep this rank's experts alone, each layer's as soon as all of them are drawn: the way
    `deepspeed.zero.Init` works, from outside of the model."""
    draw_all = Experts.__init__

    def keep_own(experts: Experts, config: ModelConfig) -> None:
        draw_all(experts, config)
        for name, weight in list(experts.named_parameters()):
            own = own_experts(weight.detach(), config.num_experts // ep_size)
            setattr(experts, name, nn.Parameter(own.clone()))

    if ep_size > 1:
        Experts.__init__ = keep_own  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Experts.__init__ = draw_all  # type: ignore[method-assign]


def _repack(experts_source: Any, spec: Any, ep_rank: int, ep_size: int) -> Any:
    """AutoEP's cut of this rank's experts, from a layer that has all of them or those alone."""
    weight = experts_source.down_proj
    is_whole = getattr(weight, "ds_shape", weight.shape)[0] == spec.num_experts
    return repack_expert_weights(experts_source, spec, *((ep_rank, ep_size) if is_whole else (0, 1)))


auto_ep_layer.repack_expert_weights = _repack


def replace_experts(resolved: ResolvedRun, model: MiniMindForCausalLM) -> None:
    """Put `deepspeed.moe` in place of the model's experts, where that is to run them: each rank keeps its own share.

    Before `deepspeed.initialize`; AutoEP takes them over inside it. Every rank calls this.
    """
    train, config = resolved.train, resolved.model
    if train.moe_backend != "deepspeed":
        return
    ep_size = train.ep_size
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    for number, layer in enumerate(model.model.layers):
        if not isinstance(layer.mlp, MoEFeedForward):
            continue
        source, native = layer.mlp, NativeExperts(layer.mlp, train)
        with torch.no_grad():
            for own_name, parameter in native.named_parameters():
                part = find_part(f"model.layers.{number}.mlp.{own_name}", config, ep_size)  # `source` has no others
                whole = source.get_parameter(part.name.removeprefix(f"model.layers.{number}.mlp."))
                if whole is not parameter:  # the shared experts have moved
                    parameter.copy_(whole[part.index])
        layer.mlp = native
    model.model.draws_random |= uses_random_routing(train)
    model.router_record = GateRecord()


def attach_router_hooks(resolved: ResolvedRun, model: MiniMindForCausalLM) -> None:
    """Let the model's balance be taken from the layers that DeepSpeed has put in place of its own.

    The selection bias keeps float32 whatever the model was cast to: in bfloat16 its small steps would be lost.
    """
    if resolved.train.moe_backend is None:
        return
    routers = []
    for layer in model.model.layers:
        if isinstance(layer.mlp, AutoEPMoELayer):
            router = layer.mlp.router
            if getattr(router, BIAS_NAME, None) is not None:
                setattr(router, BIAS_NAME, getattr(router, BIAS_NAME).float())
            routers.append(Router(router.gate, router))
        elif isinstance(layer.mlp, NativeExperts):
            routers.append(layer.mlp.router)
    config = resolved.model
    expected = sum(config.has_experts(layer) for layer in range(config.num_hidden_layers))
    if len(routers) != expected:
        raise RuntimeError(f"{expected} layers have experts, and DeepSpeed has taken over {len(routers)}")
    model.router_record.watch(routers)


class FastGroupedExperts(GroupedExperts):
    """AutoEP's experts as `cpu_experts` computes them, unless the JSON says how: torch's grouped product on a CPU is a
    plain loop in 16 bit, and MKL's in float32."""

    def forward(self, x: torch.Tensor, num_tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """(M, hidden_size) rows sorted by expert, `num_tokens_per_expert` (E,) -> the same shape."""
        is_default = self.use_grouped_mm and self.gate_up_impl == "separate" and self.activation == "swiglu"
        if torch.compiler.is_compiling() or not is_default:
            return super().forward(x, num_tokens_per_expert)
        weights = (weight.to(x.dtype) for weight in (self.w1, self.w3, self.w2))
        return cpu_experts(x, num_tokens_per_expert.tolist(), *weights)


class CastGroupedExperts(GroupedExperts):
    """AutoEP's experts under autocast (ZeRO stage 0): autocast does not know the grouped product, which would run in
    float32, on a GPU as a loop."""

    def forward(self, x: torch.Tensor, num_tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """(M, hidden_size) rows sorted by expert, `num_tokens_per_expert` (E,) -> the same shape."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))  # and with it the weights
        return super().forward(x, num_tokens_per_expert)


def find_grouped_product(precision: Precision, device: torch.device) -> str:
    """What multiplies the experts of a layer on an accelerator: "torch" at once, in bf16 on sm90
    and sm100 alone; "triton", a kernel of DeepSpeed's, which would compute fp32 in TF32; else "loop", torch's over the
    experts, whose sizes it reads on the host."""
    major, _ = compute_capability(device) or (0, 0)
    if precision == "bf16" and major in (9, 10):
        return "torch"
    return "triton" if is_triton_available() and precision != "fp32" and major >= 7 else "loop"


def choose_grouped_product(resolved: ResolvedRun, model: nn.Module, device: torch.device) -> None:
    """Let AutoEP's experts take the product of `find_grouped_product`, unless the JSON says which; DeepSpeed itself
    takes its kernel below sm90 alone, and there in fp32 too."""
    told = resolved.ds.get("expert_parallel", {}).keys() & {"gate_up_impl", "disable_triton_grouped_mm"}
    if compute_capability(device) is not None and not told:
        product = find_grouped_product(resolved.train.precision, device)
        for module in model.modules():
            if isinstance(module, GroupedExperts) and module.use_grouped_mm:
                module.use_triton_grouped_mm = product == "triton"


AUTOEP_EXPERTS = (
    Kernel("experts", GroupedExperts, FastGroupedExperts, on_cpu),
    Kernel("experts", GroupedExperts, CastGroupedExperts, on_gpu),
)


def split_groups(parameter_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer's groups, each with a `name`, with the experts that not every rank holds apart: DeepSpeed knows
    them by that. A dense model's groups stay as they are."""
    if any(is_moe_param(parameter) for group in parameter_groups for parameter in group["params"]):
        return split_params_into_different_moe_groups_for_optimizer(parameter_groups)
    return parameter_groups


def global_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """2-norm of the reduced gradients of all parameters of all ranks, float32 () on the device. Every rank calls this.

    A shared parameter has the same gradient on every rank, an expert's on those that hold it; of a matrix that a tensor
    group shares each of its ranks has a part.
    """
    shared: list[torch.Tensor] = []
    cut: list[torch.Tensor] = []
    experts: dict[str, list[torch.Tensor]] = {}
    for parameter in parameters:
        kind = experts.setdefault(parameter.group_name, []) if is_moe_param(parameter) else shared  # type: ignore
        kind = cut if is_model_parallel_parameter(parameter) else kind
        # On CPU the squares are summed in float64: in float32 the sum over a large matrix is off by 1e-4.
        dtype = torch.float64 if parameter.device.type == "cpu" else torch.float32
        kind.append(torch.linalg.vector_norm(parameter.grad, dtype=dtype))
    norms = [_combine(shared)] if shared else []
    if cut:
        square = _combine(cut).square()
        torch.distributed.all_reduce(square, group=groups.get_tensor_model_parallel_group())
        norms.append(square.sqrt())
    for name in sorted(experts):
        square = _combine(experts[name]).square()
        group = groups._get_expert_parallel_group(name)
        if torch.distributed.get_world_size(group) > 1:
            torch.distributed.all_reduce(square, group=group)  # over the ranks that hold the other experts
        norms.append(square.sqrt())
    return _combine(norms).float()


def _combine(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack(list(norms)))
