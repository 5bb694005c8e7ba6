"""Our kernels in the classes of transformers' FalconMamba; see model.hf.accelerate.

The classes have the names of transformers' own, since save_pretrained, device maps and others go by
the name of a class. They hold no state: a model changes its class and nothing else. Axes as in
model/mamba.py.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.falcon_mamba import modeling_falcon_mamba as original

from core.errors import InputError
from model.config import Backend
from model.kernels import Kernels, load
from model.kernels.cross_entropy import linear_cross_entropy

IGNORED = -100  # label of tokens without a loss


class Layout(NamedTuple):
    """What blocks pass on to their mixers as `attention_mask`."""

    mask: Tensor | None  # [b, l], 0 for padding
    doc_starts: Tensor | None  # [b, l] bool


@cache
def kernels_of(device: str) -> Kernels:
    """The fastest kernels of a type of device."""
    return load(Backend.auto, device)


def packed_doc_starts(
    position_ids: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor | None:
    """Where documents start [b, l], from positions within them or from their indices, both [b, l].

    These are what transformers' and TRL's collators give with flattened batches.
    """
    if seq_idx is not None:
        changes = seq_idx[:, 1:] != seq_idx[:, :-1]
        return F.pad(changes, (1, 0), value=True)
    return None if position_ids is None else position_ids == 0


class FalconMambaRMSNorm(original.FalconMambaRMSNorm):
    """RMSNorm in one kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., e] -> [..., e]."""
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        rms_norm = kernels_of(hidden_states.device.type).rms_norm
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, dtype=dtype)


class FalconMambaMixer(original.FalconMambaMixer):
    """The mixer with our convolution, norms and scan.

    Steps that continue from a cache are transformers' own.
    """

    @force_accelerate_hooks(["conv1d", "dt_proj"])
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | Layout | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [b, l, e] -> [b, l, e]."""
        layout = attention_mask if isinstance(attention_mask, Layout) else None
        mask, doc_starts = layout or (attention_mask, None)
        if cache_params is not None and continues(cache_params, self.layer_idx):
            return super().forward(hidden_states, cache_params, mask, **kwargs)
        kernels = kernels_of(hidden_states.device.type)
        masked = original.apply_mask_to_padding_states(hidden_states, mask)
        conv_input, gate = self.in_proj(masked).chunk(2, dim=-1)
        if cache_params is not None:
            cache_params.update_conv_state(
                conv_input.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size
            )
        u = self._convolve(kernels, conv_input, doc_starts)
        u = original.apply_mask_to_padding_states(u, mask)
        split = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        normed = kernels.rms_norm(self.x_proj(u), None, self.rms_eps, split)
        dt, B, C = normed.split(split, dim=-1)
        dt, dt_bias = self._project_dt(dt)
        A = -torch.exp(self.A_log.float())
        y, last_state = kernels.selective_scan(u, dt, A, B, C, self.D, gate, dt_bias, doc_starts)
        if cache_params is not None:
            cache_params.update_recurrent_state(last_state, self.layer_idx)
        output: Tensor = self.out_proj(y.to(hidden_states.dtype))
        return output

    def _convolve(self, kernels: Kernels, x: Tensor, doc_starts: Tensor | None) -> Tensor:
        """x [b, l, d] -> silu of the causal convolution [b, l, d]."""
        conv: Any = self.conv1d
        if is_plain(conv, nn.Conv1d):
            return kernels.causal_conv1d(x, conv.weight.squeeze(1), conv.bias, doc_starts)
        if doc_starts is not None:
            raise InputError(
                "documents in one sequence need the convolution's own weight: remove the adapter "
                "on conv1d, or do not pack"
            )
        convolved: Tensor = conv(x.transpose(1, 2))[..., : x.shape[1]]
        return F.silu(convolved).transpose(1, 2)

    def _project_dt(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """dt [b, l, r] -> [b, l, d] and the bias [d] that the scan adds in fp32."""
        proj = self.dt_proj
        if is_plain(proj, nn.Linear):
            return F.linear(dt, proj.weight), proj.bias.float()
        # what an adapter or a quantizer makes of it, with the bias
        return proj(dt), self.D.new_zeros(self.intermediate_size, dtype=torch.float32)


class FalconMambaModel(original.FalconMambaModel):
    """The backbone, which resets convolution and state where documents start."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        *arguments: Any,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own; position_ids or seq_idx [b, l] say where documents start."""
        doc_starts = packed_doc_starts(position_ids, seq_idx)
        if doc_starts is not None:
            if kwargs.get("cache_params") is not None or kwargs.get("use_cache"):
                raise InputError("several documents in a sequence have no cache: use_cache=False")
            kwargs["use_cache"] = False
            attention_mask = Layout(attention_mask, doc_starts)  # type: ignore[assignment]
        return super().forward(input_ids, *arguments, attention_mask=attention_mask, **kwargs)


class FalconMambaForCausalLM(original.FalconMambaForCausalLM):
    """The language model; `fused_loss` leaves out the logits where there are labels."""

    fused_loss = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Any = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own; see FalconMambaModel for position_ids and seq_idx."""
        starts = {name: kwargs.pop(name, None) for name in ("position_ids", "seq_idx")}
        outputs = self.backbone(
            input_ids,
            cache_params=cache_params,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            use_cache=use_cache,
            attention_mask=attention_mask,
            **starts,
        )
        hidden = original.slice_logits_to_keep(outputs[0], logits_to_keep)
        hidden = hidden.to(self.lm_head.weight.dtype)
        loss = logits = None
        reads_head = is_plain(self.lm_head, nn.Linear) and not hasattr(self.lm_head, "_hf_hook")
        if self.fused_loss and labels is not None and reads_head:
            loss = self._fused_loss(hidden, labels, **kwargs)
        else:
            logits = self.lm_head(hidden).float()
            if labels is not None:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
                )
        result = original.FalconMambaCausalLMOutput(
            loss=loss,
            logits=logits,
            cache_params=outputs.cache_params,
            hidden_states=outputs.hidden_states,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()

    def _fused_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Mean loss of the tokens with a label, or their sum over `num_items_in_batch`.

        hidden [b, l, e]; labels [b, l] are of the same positions, shift_labels [b, l] of the next.
        """
        if shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        targets = shift_labels.flatten()
        counted = targets != IGNORED
        losses, _ = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.lm_head.weight,
            targets.clamp(min=0),
            kernels_of(hidden.device.type).loss,
        )
        total = (losses * counted).sum()
        return total / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


def continues(cache_params: Any, layer: int) -> bool:
    """Whether a cache has tokens before these, or must record its states."""
    has_state = cache_params.get_recurrent_state(layer, state_idx=0) is not None
    return has_state or bool(cache_params.is_recording_past(layer))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's result is that of its weight alone: it has no adapter, quantizer or hook.

    ZeRO-3 gathers weights in a hook, and an adapter of PEFT is another class.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return type(module) is kind and not any(hooks)


REPLACED: dict[type, Any] = {
    original.FalconMambaRMSNorm: FalconMambaRMSNorm,
    original.FalconMambaMixer: FalconMambaMixer,
    original.FalconMambaModel: FalconMambaModel,
    original.FalconMambaForCausalLM: FalconMambaForCausalLM,
}


def replace_classes(model: nn.Module, *, loss: bool) -> None:
    """Give each module of a FalconMamba of transformers our class.

    Raises InputError for a model without such modules, or with options that our kernels lack.
    """
    mixers = [m for m in model.modules() if isinstance(m, original.FalconMambaMixer)]
    if not mixers:
        raise InputError(f"{type(model).__name__} has no mixers of transformers' FalconMamba")
    for mixer in mixers:
        if type(mixer) not in (original.FalconMambaMixer, FalconMambaMixer):
            raise InputError(f"a mixer is a {type(mixer)}: accelerate the model before changing it")
        if mixer.activation != "silu" or mixer.conv1d.bias is None:
            raise InputError("our convolution has a bias and silu: set use_conv_bias, hidden_act")
    for module in model.modules():
        if (kind := REPLACED.get(type(module))) is not None:
            module.__class__ = kind
            if "_old_forward" in vars(module):  # below a hook of the library accelerate
                module._old_forward = kind.forward.__get__(module)
        if isinstance(module, FalconMambaForCausalLM):
            module.fused_loss = loss
