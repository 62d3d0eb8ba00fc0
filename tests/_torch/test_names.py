"""Every private name of torch that fxpass relies on; a failure here says what a new torch changed."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

NAMES = """
torch.nn.attention._sdpa_kernel
torch._dynamo.bytecode_transformation.create_call_function
torch._dynamo.bytecode_transformation.create_instruction
torch._dynamo.config.capture_scalar_outputs
torch._dynamo.exc.UnspecializeRestartAnalysis
torch._dynamo.exc.Unsupported
torch._dynamo.exc.UserError
torch._dynamo.guards.GuardBuilder.ID_MATCH
torch._dynamo.output_graph.OutputGraph.install_global_by_id
torch._dynamo.side_effects.SideEffects.codegen_hooks
torch._dynamo.side_effects.SideEffects.is_empty
torch._dynamo.side_effects.SideEffects.is_modified
torch._dynamo.side_effects.SideEffects.prune_dead_object_new
torch._dynamo.source.GlobalSource
torch._dynamo.source.is_from_local_source
torch._dynamo.source.is_from_optimizer_source
torch._dynamo.symbolic_convert.InliningInstructionTranslator.inline_call
torch._dynamo.symbolic_convert.InstructionTranslator.run
torch._dynamo.symbolic_convert.InstructionTranslator.should_compile_partial_graph
torch._dynamo.symbolic_convert.InstructionTranslator.step_graph_break
torch._dynamo.symbolic_convert.InstructionTranslatorBase._format_value
torch._dynamo.symbolic_convert.InstructionTranslatorBase.call_function
torch._dynamo.symbolic_convert.InstructionTranslatorBase.log_graph_break
torch._dynamo.variables.base.AttributeMutationNew
torch._dynamo.variables.base.ValueMutationNew
torch._dynamo.variables.builtin.BuiltinVariable.call_function
torch._dynamo.variables.ctx_manager.NullContextVariable
torch._dynamo.variables.ctx_manager.SDPAKernelVariable.enter
torch._dynamo.variables.dicts.ConstDictVariable
torch._dynamo.variables.functions.WrapperUserFunctionVariable.call_function
torch._dynamo.variables.lazy.LazySymNodeFormatString
torch._dynamo.variables.lazy.LazyVariableTracker.peek_value
torch._dynamo.variables.misc.GetAttrVariable
torch._dynamo.variables.misc.StringFormatVariable.create
torch._dynamo.variables.tensor.TensorVariable._warn_capture_scalar_outputs
torch._dynamo.variables.tensor.TensorVariable.method_tolist
torch._dynamo.variables.user_defined.UserDefinedObjectVariable
torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode
torch.fx.experimental.symbolic_shapes.free_unbacked_symbols
torch._dynamo.convert_frame._compile
torch._dynamo.convert_frame.get_and_maybe_log_recompilation_reasons
torch._dynamo.config.accumulated_recompile_limit
torch._dynamo.config.allow_unspec_int_on_nn_module
torch._dynamo.config.recompile_limit
torch._dynamo.config.skip_nnmodule_hook_guards
torch._dynamo.config.trace_autograd_ops
torch._dynamo.decorators.skip
torch._dynamo.eval_frame._stance.stance
torch._dynamo.side_effects.SideEffects._get_modified_vars
torch._dynamo.side_effects.SideEffects.codegen_update_mutated
torch._dynamo.variables.builder.VariableBuilder.wrap_listlike
torch._dynamo.variables.lists.DequeVariable
torch._dynamo.variables.lists.ListVariable
torch._dynamo.variables.tensor.TensorVariable.method_attr_retain_grad
torch.nn.modules.module._global_forward_hooks
torch._C._get_mkldnn_enabled
torch._C._set_mkldnn_enabled
torch._dynamo.config.allow_rnn
torch._dynamo.eval_frame._TorchDynamoContext
torch._dynamo.eval_frame.OptimizedModule.dynamo_ctx
torch._dynamo.guards.GuardBuilder.SEQUENCE_LENGTH
torch._dynamo.guards.install_guard
torch._dynamo.output_graph.OutputGraph.compile_subgraph
torch._dynamo.output_graph.OutputGraph._validate_outputs_safe_for_autograd_nodes
torch._dynamo.output_graph.collect_reachable_grad_fns
torch._dynamo.side_effects.SideEffects.store_attr
torch._dynamo.side_effects.SideEffects.is_attribute_mutation
torch._dynamo.source.AttrSource
torch._dynamo.source.DictGetItemSource
torch._dynamo.source.GetItemSource
torch._dynamo.variables.builder.VariableBuilder._wrap
torch._dynamo.variables.builder.get_static_address_type
torch._dynamo.variables.ctx_manager.GradModeVariable.create
torch._dynamo.variables.functions.UserMethodVariable.call_function
torch._dynamo.variables.optimizer.OptimizerVariable.call_method
torch._dynamo.variables.optimizer.OptimizerVariable.var_getattr
torch._dynamo.variables.tensor.TensorVariable.method_backward
torch._dynamo.side_effects.SideEffects.has_pending_mutation_of_attr
torch._dynamo.variables.tensor.TensorVariable._collect_backward_inputs
torch._dynamo.variables.tensor.TensorVariable.var_getattr
torch._functorch.config.remat_using_tags_for_fwd_loss_bwd_graph
torch._dynamo.variables.user_defined.UserDefinedObjectVariable.var_getattr
torch._dynamo.backends.common.aot_autograd
torch._functorch._aot_autograd.logging_utils.setup_stacktrace_preservation_hooks
torch._guards.TracingContext.extract_stack
torch._inductor.codegen.cpp.CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM
torch._inductor.compile_fx.compile_fx_inner
torch._inductor.codegen.wrapper.AllocateLine
torch._inductor.codegen.wrapper.FreeIfNotReusedLine
torch._inductor.codegen.wrapper.FreeLine
torch._inductor.codegen.wrapper.KernelCallLine
torch._inductor.codegen.wrapper.MultiOutputLine
torch._inductor.codegen.wrapper.PythonWrapperCodegen.run_wrapper_ir_passes
torch._inductor.codegen.wrapper.ReinterpretLine
torch._inductor.codegen.wrapper.ReuseLine
torch._inductor.codegen.wrapper.WrapperLine
torch._inductor.compile_fx._InProcessFxCompile.codegen_and_compile
torch._inductor.graph.GraphLowering.get_allocation_storage_size
torch._inductor.graph.GraphLowering.get_output_names
torch._inductor.ir.MultiOutputLayout
torch._inductor.memory.assign_memory_planning_info_for_scheduler_buffers
torch._inductor.memory.estimate_peak_memory
torch._inductor.memory.get_freeable_input_buf
torch._inductor.utils.get_dtype_size
torch._inductor.virtualized.V
torch.compiler.config.cache_key_tag
torch._inductor.config.max_fusion_buffer_group_pairwise_attempts
torch._inductor.config.reorder_for_peak_memory
torch._inductor.decomposition.select_decomp_table
torch._dynamo.config.capture_dynamic_output_shape_ops
torch._dynamo.config.capture_scalar_outputs
torch._dynamo.utils.run_node
torch._dynamo.variables.base.VariableTracker.realize
torch._dynamo.variables.builtin.BuiltinVariable.call_function
torch._dynamo.variables.functions.SkipFunctionVariable.call_function
torch._dynamo.variables.functions.UserFunctionVariable.call_function
torch._dynamo.variables.functions.UserFunctionVariable.self_args
torch._dynamo.variables.tensor.SymNodeVariable
torch._dynamo.variables.tensor.TensorVariable.method___setitem__
torch._dynamo.variables.torch.TorchInGraphFunctionVariable.call_function
torch._dynamo.variables.user_defined.UserDefinedClassVariable.call_function
torch._C._ForceDispatchKeyGuard
torch._C._dispatch_tls_local_exclude_set
torch._C._dispatch_tls_local_include_set
torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_expr
torch.fx.experimental.symbolic_shapes.ShapeEnv.guard_or_defer_runtime_assert
torch.fx.experimental.symbolic_shapes.ShapeEnv.ignore_fresh_unbacked_symbols
torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode
torch.fx.experimental.symbolic_shapes.guard_or_false
torch.fx.experimental.symbolic_shapes.guard_or_true
torch.fx.experimental.symbolic_shapes.has_free_unbacked_symbols
torch.fx.experimental.symbolic_shapes.rebind_unbacked
torch.nn.modules.batchnorm._BatchNorm.forward
torch.nn.modules.transformer._detect_is_causal_mask
torch._inductor.fx_passes.joint_graph.joint_graph_passes
torch._inductor.list_mode_options
torch.compiler._is_compiling_flag
torch.fx.traceback.annotate
torch.fx.traceback.preserve_node_meta
""".split()

INSTANCE_ATTRIBUTES = {"dynamo_ctx"}  # set in __init__: looked for in the class's annotations


@pytest.mark.parametrize("name", NAMES)
def test_exists(name: str) -> None:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
            break
        except ImportError:
            continue
    else:
        pytest.fail(f"torch {torch.__version__} has no module for {name}")
    for part in parts[cut:]:
        known = part in getattr(found, "__annotations__", {}) or part in getattr(
            found, "_opt_mod_attributes", ()
        )
        if part in INSTANCE_ATTRIBUTES and known:
            return
        assert hasattr(found, part), f"torch {torch.__version__} has no {name}: see fxpass/_torch/"
        found = getattr(found, part)


def test_the_compiler_function_is_the_sixth_argument() -> None:
    from torch._dynamo import convert_frame

    parameters = list(inspect.signature(inspect.unwrap(convert_frame._compile)).parameters)
    assert (parameters[0], parameters[5]) == ("code", "compiler_fn")


def test_patches_are_gone_after_a_compilation() -> None:
    from torch._dynamo.variables import builder, optimizer, tensor

    import fxpass

    before = [
        tensor.TensorVariable.method_backward,
        optimizer.OptimizerVariable.call_method,
        builder.VariableBuilder._wrap,
        torch._dynamo.config.trace_autograd_ops,
    ]
    for body in (lambda x: x + 1, lambda x: print(x)):
        torch.compile(body, backend=fxpass.MixedPrecision(codegen="eager"))(torch.ones(1))
    after = [
        tensor.TensorVariable.method_backward,
        optimizer.OptimizerVariable.call_method,
        builder.VariableBuilder._wrap,
        torch._dynamo.config.trace_autograd_ops,
    ]
    assert before == after
