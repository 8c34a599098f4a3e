"""Defects of the bindings, one at a time, and the call of binding_cases.py that finds each."""

import re
from dataclasses import dataclass

from pretend_cuda import ROOT, bindings_object, libraries, operators_library

OPERATORS, ARGUMENTS = "ops_cuda.cpp", "arguments.h"


@dataclass(frozen=True)
class Mutation:
    name: str
    case: str
    old: str  # occurs once
    new: str
    file: str = OPERATORS


def guard_forgotten(case, after):
    """Return the mutation in which the guard before the text `after` is missing."""
    return Mutation(f"no guard: {case}", case, f"    const c10::DeviceGuard guard(device);\n{after}", after)


def no_guard(case, tensor, storage):
    """Return the mutation in which the guard of a tensor's device before `storage` is missing."""
    storage = f"    {storage} storage;"
    return Mutation(
        f"no guard: {case}", case, f"    const c10::DeviceGuard guard({tensor}.device());\n{storage}", storage
    )


def library(folder, called):
    """Return a library of the operators with every defect.

    PRETEND_CUDA_MUTANT holds the number of the one that is on; with the number of all there is none.

    called: the names of the operators that each case calls, as far as they are known. A defect is put into these alone,
    because what nobody refers to is not compiled.
    """
    source = folder / "mutants.cpp"
    source.write_text(_source(called))
    return operators_library(libraries()[0], bindings_object(source, ["-O0", "-w"]))


def bindings():
    """Return the text of each file that a mutation may change."""
    return {name: (ROOT / "python" / name).read_text() for name in (ARGUMENTS, OPERATORS)}


def _source(called):
    """Return the bindings once without a defect and once for each, each time in a namespace of its own."""
    texts = bindings()
    registered = set(re.findall(r'm\.impl\("(\w+)"', texts[OPERATORS]))
    included = dict.fromkeys(line for text in texts.values() for line in _includes(text) if ARGUMENTS not in line)
    included = [line.replace('"../', f'"{ROOT}/') for line in included]
    parts = ["\n".join([*included, "#include <cstdlib>", "#include <set>", "#include <string>"])]
    choices = []
    for number, mutation in enumerate([*MUTATIONS, None]):
        changed = dict(texts)
        names = sorted(called[mutation.case] & registered or registered) if mutation else None
        if mutation:
            changed[mutation.file] = changed[mutation.file].replace(mutation.old, mutation.new)
            others = ", ".join(f'"{name}"' for name in names)
            choices.append(
                f"if (number == {number}) return add_{number}(m, {{}}), add_{len(MUTATIONS)}(m, {{{others}}});"
            )
        parts += [_in_namespace(text, f"mutant_{number}", names) for text in changed.values()]
    choices.append(f"add_{len(MUTATIONS)}(m, {{}});")
    parts.append(
        "TORCH_LIBRARY_IMPL(nanochat_native, CUDA, m) {\n"
        '    const int number = std::atoi(std::getenv("PRETEND_CUDA_MUTANT"));\n    ' + "\n    ".join(choices) + "\n}"
    )
    return "\n".join(parts)


def _includes(text):
    return re.findall(r"^#include .*$", text, re.MULTILINE)


def _in_namespace(text, name, registered):
    """Return a file of the bindings in a namespace. registered: the operators that it registers; None stands for all."""
    text = re.sub(r"^#(include|pragma) .*$", "", text, flags=re.MULTILINE)
    body, _, registrations = text.partition("TORCH_LIBRARY_IMPL")
    body = body.replace("namespace nanochat {", f"namespace nanochat::{name} {{", 1)
    if not registrations:
        return body
    lines = [
        f'    if (!others.count("{operator}")) m.impl("{operator}", nanochat::{name}::{function});'
        for operator, function in re.findall(r'm\.impl\("(\w+)", nanochat::(\w+)\);', registrations)
        if registered is None or operator in registered
    ]
    head = f"static void add_{name.removeprefix('mutant_')}(torch::Library& m, const std::set<std::string>& others) {{"
    return "\n".join([body + head, *lines, "}"])


# fmt: off
MUTATIONS = [
    # --- workspaces, streams, devices ---
    Mutation("workspace on the CPU", "muon_momentum", "dtype(at::kByte).device(device)", "dtype(at::kByte)"),
    Mutation("workspace a number short", "muon_momentum", "at::empty({bytes},", "at::empty({std::max<int64_t>(bytes - 8, 0)},"),
    Mutation("no workspace", "decoding", "launch(cuda::attention_forward, cuda::attention_forward_workspace_bytes,", "launch(cuda::attention_forward, {},"),
    Mutation("workspace of another operator", "attention_backward_of_strided_results", "cuda::attention_backward_workspace_bytes, arguments, device);", "{}, arguments, device);"),
    Mutation("no workspace for the gradients of factors", "mix", "launch(cuda::mix_rms_norm_backward, cuda::mix_rms_norm_backward_workspace_bytes,", "launch(cuda::mix_rms_norm_backward, {},"),
    Mutation("no stream", "loss", "        arguments.execution.stream = current_stream(device);\n", ""),
    Mutation("default stream", "muon_update", ".getStream(device).native_handle()", ".getDefaultStream(device).native_handle()"),
    guard_forgotten("attention_of_awkward_strides", "    Tensor out = at::empty(q_.sizes(), q_.options());"),
    guard_forgotten("attention_backward_of_strided_results", "    Tensor dq = at::empty(q_.sizes(), q_.options());"),
    guard_forgotten("adamw", "    arguments.execution.device = current_gpu();\n    launch(cuda::adamw,"),
    guard_forgotten("muon_momentum", "    arguments.execution.device = current_gpu();\n    launch(cuda::muon_momentum,"),
    guard_forgotten("muon_update", "    arguments.execution.device = current_gpu();\n    launch(cuda::muon_update,"),
    *(
        Mutation(f"no GPU: {case}", case, f"    arguments.execution.device = current_gpu();\n    launch(cuda::{case},", f"    launch(cuda::{case},")
        for case in ("adamw", "muon_momentum", "muon_update")
    ),
    guard_forgotten("normuon_update", "    if (arguments.count > 0) launch(cuda::normuon_update,"),
    guard_forgotten("loss", "    const at::AutoDispatchBelowADInplaceOrView no_autograd;"),
    no_guard("norms", "x", "RMSNormStorage"),
    no_guard("rms_norm_of_strided_results", "y", "RMSNormBackwardStorage"),
    no_guard("embedding_norm", "table", "EmbeddingRMSNormStorage"),
    no_guard("value_embedding", "v", "AddValueEmbeddingStorage"),
    no_guard("value_embedding_of_bfloat16", "dout", "AddValueEmbeddingBackwardStorage"),
    no_guard("smear", "x", "SmearStorage"),
    no_guard("smear_of_bfloat16", "x", "SmearBackwardStorage"),
    no_guard("mix", "x", "MixRMSNormStorage"),
    no_guard("mix_backward_of_strided_results", "y", "MixRMSNormBackwardStorage"),
    no_guard("rotation", "q", "RotaryNormStorage"),
    no_guard("rotation_of_strided_results", "dq_out", "RotaryNormBackwardStorage"),
    no_guard("squared_relu", "x", "ReluSquaredStorage"),
    no_guard("squared_relu_of_bfloat16", "dy", "ReluSquaredBackwardStorage"),
    Mutation("no guard: newton_schulz", "newton_schulz_of_strided_matrices", "const c10::DeviceGuard guard(g.device());", ""),
    Mutation("no guard: newton_schulz_update", "newton_schulz_update", "const c10::DeviceGuard guard(update.device());", ""),
    # --- strides ---
    Mutation("misaligned tensor not copied", "attention_of_awkward_strides", "% kChunk == 0 && tensor.stride(3) == 1;", "% 2 == 0 && tensor.stride(3) == 1;"),
    Mutation("lengths taken for contiguous", "decoding", "lengths_->contiguous()", "*lengths_"),
    Mutation("lse taken for contiguous", "attention_backward_of_strided_results", "lse = lse_.contiguous();", "lse = lse_;"),
    Mutation("strides of heads and rows exchanged", "attention_of_awkward_strides", "tensor.stride(1), tensor.stride(2)};", "tensor.stride(2), tensor.stride(1)};", ARGUMENTS),
    Mutation("q's strides for out", "attention_of_awkward_strides", ".out_strides = strides_of(out),\n            .lse", ".out_strides = strides_of(q),\n            .lse", ARGUMENTS),
    Mutation("matrices taken for contiguous", "newton_schulz_of_strided_matrices", "storage = {g.contiguous(),", "storage = {g,", ARGUMENTS),
    Mutation("norms taken for contiguous", "newton_schulz_of_strided_matrices", "norms->contiguous()", "*norms", ARGUMENTS),
    Mutation("targets taken for contiguous", "loss", "targets = targets_.contiguous();", "targets = targets_;"),
    Mutation("x of a norm taken for contiguous", "norms", "storage = {.x = x.contiguous(),\n               .residual", "storage = {.x = x,\n               .residual", ARGUMENTS),
    Mutation("dsum taken for contiguous", "norms", "dsum->contiguous()", "*dsum", ARGUMENTS),
    Mutation("r taken for contiguous", "rms_norm_of_strided_results", ".r = r.contiguous(),", ".r = r,", ARGUMENTS),
    Mutation("x of a mix taken for contiguous", "mix_without_a_residual", "storage = {x.contiguous(), contiguous_or_none", "storage = {x, contiguous_or_none", ARGUMENTS),
    Mutation("x0 taken for contiguous", "mix", "contiguous_or_none(residual), x0.contiguous()};", "contiguous_or_none(residual), x0};", ARGUMENTS),
    Mutation("optional stream taken for contiguous", "mix", "tensor ? tensor->contiguous() : at::Tensor();\n}\n\nstruct MixRMSNormStorage", "tensor ? *tensor : at::Tensor();\n}\n\nstruct MixRMSNormStorage", ARGUMENTS),
    Mutation("z taken for contiguous", "mix_backward_of_strided_results", "storage.z = z.contiguous();", "storage.z = z;", ARGUMENTS),
    Mutation("r of a mix taken for contiguous", "mix_backward_of_strided_results", "storage.r = r.contiguous();", "storage.r = r;", ARGUMENTS),
    Mutation("tokens taken for contiguous", "embedding_norm", "tokens.contiguous()", "tokens", ARGUMENTS),
    Mutation("table taken for contiguous", "embedding_norm_in_bfloat16", ".table = table.contiguous(),\n               .y", ".table = table,\n               .y", ARGUMENTS),
    Mutation("v taken for contiguous", "value_embedding", "storage = {.v = v.contiguous(),", "storage = {.v = v,", ARGUMENTS),
    Mutation("dout taken for contiguous", "value_embedding", "storage = {.dout = dout.contiguous(),\n               .h", "storage = {.dout = dout,\n               .h", ARGUMENTS),
    Mutation("gate taken for contiguous", "value_embedding_of_bfloat16", ".gate = gate.contiguous(),\n               .table = table.contiguous(),\n               .ids = ids.contiguous(),\n               .out", ".gate = gate,\n               .table = table.contiguous(),\n               .ids = ids.contiguous(),\n               .out", ARGUMENTS),
    Mutation("ids of the gradient taken for contiguous", "value_embedding", ".ids = ids.contiguous(),\n               .dh", ".ids = ids,\n               .dh", ARGUMENTS),
    Mutation("rows of h without their stride", "value_embedding", "a.h_stride = storage.h.stride(0);", "a.h_stride = a.I;", ARGUMENTS),
    Mutation("x of smear taken for contiguous", "smear", "storage = {.x = x.contiguous(), .gate", "storage = {.x = x, .gate", ARGUMENTS),
    Mutation("gate of smear taken for contiguous", "smear_of_bfloat16", ".gate = gate.contiguous(), .out", ".gate = gate, .out", ARGUMENTS),
    Mutation("dout of smear taken for contiguous", "smear", "storage = {.dout = dout.contiguous(),\n               .x", "storage = {.dout = dout,\n               .x", ARGUMENTS),
    Mutation("q's strides for k", "rotation", ".k_strides = strides_of(storage.k)", ".k_strides = strides_of(storage.q_out)", ARGUMENTS),
    Mutation("stride of the results for the gradient", "rotation", "strides_of(storage.dk_out)", "strides_of(storage.dk)", ARGUMENTS),
    Mutation("tables taken for contiguous", "rotation", ".cos_stride = storage.cos.stride(0),\n            .sin_stride = storage.sin.stride(0),\n            .eps", ".cos_stride = storage.cos.size(1),\n            .sin_stride = storage.sin.size(1),\n            .eps", ARGUMENTS),
    Mutation("stride in D not looked at", "rotation_of_strided_results", "tensor.size(-1) == 1 || tensor.stride(-1) == 1 ? tensor", "true ? tensor", ARGUMENTS),
    Mutation("x of relu_squared taken for contiguous", "squared_relu", "storage.x = x.contiguous();", "storage.x = x;", ARGUMENTS),
    # --- pointers ---
    Mutation("residual dropped", "norms", "residual ? storage.residual.const_data_ptr() : nullptr", "nullptr", ARGUMENTS),
    Mutation("dsum dropped", "norms", "dsum ? storage.dsum.const_data_ptr() : nullptr", "nullptr", ARGUMENTS),
    Mutation("workspace of value embeddings forgotten", "value_embedding_of_a_float32_table", "cuda::add_value_embedding_backward_workspace_bytes, arguments,", "{}, arguments,"),
    Mutation("workspace of smear forgotten", "smear", "cuda::smear_backward_workspace_bytes, arguments,", "{}, arguments,"),
    Mutation("type of the table for that of the values", "value_embedding_of_a_float32_table", ".table_dtype = checked.table_dtype,", ".table_dtype = checked.dtype,", ARGUMENTS),
    Mutation("dgate and dlambda exchanged", "smear", ".dgate = storage.dgate.mutable_data_ptr(),\n            .dlambda = storage.dlambda.mutable_data_ptr()", ".dgate = storage.dlambda.mutable_data_ptr(),\n            .dlambda = storage.dgate.mutable_data_ptr()", ARGUMENTS),
    Mutation("q_r and k_r exchanged", "rotation_of_strided_results", ".q_r = storage.q_r.mutable_data_ptr(),\n            .k_r = storage.k_r.mutable", ".q_r = storage.k_r.mutable_data_ptr(),\n            .k_r = storage.q_r.mutable", ARGUMENTS),
    Mutation("cos and sin exchanged", "rotation", ".cos = storage.cos.const_data_ptr(),\n            .sin = storage.sin.const_data_ptr(),\n            .cos_stride = storage.cos.stride(0),\n            .sin_stride = storage.sin.stride(0),\n            .scale", ".cos = storage.sin.const_data_ptr(),\n            .sin = storage.cos.const_data_ptr(),\n            .cos_stride = storage.cos.stride(0),\n            .sin_stride = storage.sin.stride(0),\n            .scale", ARGUMENTS),
    Mutation("residual of a mix dropped", "mix", ".residual = address_or_null(storage.residual),", ".residual = nullptr,", ARGUMENTS),
    Mutation("factors exchanged", "mix", ".x_scale = x_scale.const_data_ptr(),\n            .x0_scale = x0_scale.const_data_ptr(),\n            .z", ".x_scale = x0_scale.const_data_ptr(),\n            .x0_scale = x_scale.const_data_ptr(),\n            .z", ARGUMENTS),
    Mutation("gradients of factors exchanged", "mix", ".dx_scale = storage.dx_scale.mutable_data_ptr(),\n            .dx0_scale = storage.dx0_scale.mutable", ".dx_scale = storage.dx0_scale.mutable_data_ptr(),\n            .dx0_scale = storage.dx_scale.mutable", ARGUMENTS),
    Mutation("gradients of z and the mix exchanged", "mix", ".dz = address_or_null(storage.dz),\n            .dmixed = address_or_null(storage.dmixed),", ".dz = address_or_null(storage.dmixed),\n            .dmixed = address_or_null(storage.dz),", ARGUMENTS),
    Mutation("later gradient of x0 dropped", "mix", ".add_to = address_or_null(storage.add_to),", ".add_to = nullptr,", ARGUMENTS),
    Mutation("relu_squared_ not in place", "squared_relu", "run_relu_squared(x, true);", "run_relu_squared(x, false);"),
    Mutation("relu_squared_backward in place", "squared_relu", "return run_relu_squared_backward(dy, y, false);", "return run_relu_squared_backward(dy, y, true);"),
    Mutation("copies not passed to adamw", "adamw", ".copy = copies.empty() ? nullptr : copies[i].mutable_data_ptr(),", ".copy = nullptr,", ARGUMENTS),
    Mutation("copies not passed to muon_update", "muon_update", ".copies = copies.empty() ? nullptr : storage.copies.data(),", ".copies = nullptr,", ARGUMENTS),
    Mutation("copies not passed to normuon_update", "normuon_update", "if (a.copies) a.copies = storage.copies.data();", "a.copies = nullptr;", ARGUMENTS),
    Mutation("first matrix's second momentum for all", "normuon_update", "+ matrix * lines", "+ 0 * lines", ARGUMENTS),
    Mutation("first matrix of a parameter for all of normuon_update", "normuon_update", "const int64_t offset = matrix * a.numel;", "const int64_t offset = 0 * a.numel;", ARGUMENTS),
    Mutation("norms of rows not computed", "norms_of_rows", "if (with_row_norms && arguments.numel > 0)", "if (false)"),
    Mutation("scales not passed to newton_schulz", "newton_schulz_of_scaled_rows", ".scales = scales ? storage.scales.const_data_ptr<double>() : nullptr", ".scales = nullptr", ARGUMENTS),
    Mutation("copies not passed to newton_schulz_update", "newton_schulz_update", "    if (arguments.copies) arguments.copies = matrices.copies.data();", "    arguments.copies = nullptr;"),
    Mutation("copies of float32", "newton_schulz_update", "split(storage.copies, sizeof(uint16_t)", "split(storage.copies, sizeof(float)"),
    Mutation("dk and dv exchanged", "attention_of_awkward_strides", ".dk = dk.mutable_data_ptr(),\n            .dv = dv.mutable", ".dk = dv.mutable_data_ptr(),\n            .dv = dk.mutable", ARGUMENTS),
    Mutation("moments exchanged", "adamw", ".exp_avg = exp_avgs[i].mutable_data_ptr(),\n            .exp_avg_sq = exp_avg_sqs[i]", ".exp_avg = exp_avg_sqs[i].mutable_data_ptr(),\n            .exp_avg_sq = exp_avgs[i]", ARGUMENTS),
    Mutation("number on the device forgotten", "adamw_with_numbers_on_the_device", ".lr_address = number_address<double>(op, \"lr\", lr_tensor, device),\n            .weight_decay_address = number_address<double>(op, \"weight_decay\", weight_decay_tensor, device)};\n}\n\n// Also", ".lr_address = nullptr,\n            .weight_decay_address = nullptr};\n}\n\n// Also", ARGUMENTS),
    Mutation("first matrix of a parameter for all", "newton_schulz_update", "static_cast<char*>(tensor) + i * numel", "static_cast<char*>(tensor) + 0 * numel"),
    Mutation("one buffer short", "muon_momentum", "storage.momentum_buffers.push_back(momentum_buffers[i]", "storage.momentum_buffers.push_back(momentum_buffers[i / 2 * 2]", ARGUMENTS),
    # --- what is told to autograd ---
    Mutation("versions of moments not raised", "adamw", "for (at::TensorList updated : {params, exp_avgs, exp_avg_sqs, copies})", "for (at::TensorList updated : {params, copies})"),
    Mutation("version of a parameter not raised", "newton_schulz_update", "run_newton_schulz(orthogonalise, update.device());\n    for (at::TensorList updated : {params, copies})", "run_newton_schulz(orthogonalise, update.device());\n    for (at::TensorList updated : {copies})"),
    Mutation("version of x not raised", "squared_relu", "    mark_updated(x);\n", ""),
    Mutation("version of dy not raised", "squared_relu", "    mark_updated(dy);\n", ""),
    Mutation("version of a copy not raised", "newton_schulz_update", "run_newton_schulz(orthogonalise, update.device());\n    for (at::TensorList updated : {params, copies})", "run_newton_schulz(orthogonalise, update.device());\n    for (at::TensorList updated : {params})"),
    # --- chunks ---
    Mutation("logits of the row behind", "loss", ".logits = logits.mutable_data_ptr(),", ".logits = static_cast<char*>(logits.mutable_data_ptr()) + V * x.element_size(),"),
    Mutation("first chunk's targets for all", "loss", "targets.const_data_ptr<int64_t>() + first", "targets.const_data_ptr<int64_t>()"),
    Mutation("losses of all chunks in one place", "loss_of_each_row", "losses.mutable_data_ptr<float>() + first", "losses.mutable_data_ptr<float>()"),
    Mutation("last chunk's gradient alone", "loss", "logits.t(), chunk, first > 0)", "logits.t(), chunk, false)"),
    Mutation("first chunk added to what was there", "loss_of_one_chunk", "logits.t(), chunk, first > 0)", "logits.t(), chunk, true)"),
    Mutation("gradient of x in the first rows", "loss", "grad_x.narrow(0, first, own)", "grad_x.narrow(0, 0, own)"),
    Mutation("rows of a whole chunk in the last", "loss_of_each_row", ".rows = own,", ".rows = rows,"),
    Mutation("gradient of nothing not zero", "loss_of_nothing", "    if (N == 0) grad_weight.zero_();\n", ""),
    Mutation("wait for the number of targets", "loss", "    if (gradients) grad_scale =", "    if (mean && count.item().toLong() == 0) return {};\n    if (gradients) grad_scale ="),
]
# fmt: on
