# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, mended, and without what it does again and again: half of its time."""

import dataclasses
import functools
import inspect


@functools.cache
def patch_interpreter() -> None:
    mend_comparisons()
    spare_repetitions()
    spare_overflow()
    spare_types()


def mend_comparisons() -> None:
    """Call results of comparisons int1. Triton (3.6 to 3.9) leaves them the type of what was compared, so that a mask
    joined with a comparison of two numbers becomes one of integers, which triton 3.9 neither loads nor stores with."""
    try:
        from triton.runtime.interpreter import InterpreterBuilder, tl
    except ImportError:
        return
    compute = getattr(InterpreterBuilder, "binary_op", None)
    if compute is None:
        return

    def binary_op(*arguments):
        result = compute(*arguments)
        if result.data.dtype == bool:
            result.dtype = tl.int1
        return result

    InterpreterBuilder.binary_op = binary_op


def spare_repetitions() -> None:
    """Patch `triton.language` once per launch, not again for each call of a function of the kernel, and look numpy's
    types up instead of listing them all each time. A triton that names these things differently stays slow."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not {"tl", "_patch_lang", "_LangPatchScope", "_get_np_dtype"} <= vars(interpreter).keys():
        return
    tl, patch, numpy_type = interpreter.tl, interpreter._patch_lang, interpreter._get_np_dtype
    languages, patches, patched, types = {}, {}, set(), {}

    def patch_lang(fn):
        if fn not in languages:
            found = (value for value in fn.__globals__.values() if inspect.ismodule(value))
            languages[fn] = frozenset(module.__name__ for module in found if module in (tl, tl.core))
        language = languages[fn]
        if language in patched:
            return interpreter._LangPatchScope()  # with nothing to restore
        patched.add(language)
        if language in patches:
            scope = interpreter._LangPatchScope()
            for change in patches[language]:
                scope.set_attr(*change)
        else:
            scope = patch(fn)
            patches[language] = [(owner, name, getattr(owner, name)) for owner, name, _ in scope._changes]
        restore = scope.restore
        scope.restore = lambda: (patched.clear(), restore())
        return scope

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in types:
            types[name] = numpy_type(dtype)
        return types[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, get_np_dtype


def spare_overflow() -> None:
    """Leave out the 64-bit copy of each sum of integers: the assertion on it is off (`debug`) in the interpreter."""
    try:
        from triton.runtime.interpreter import interpreter_builder
    except ImportError:
        return
    options = getattr(interpreter_builder, "options", None)
    if options is not None and not options.debug and getattr(options, "sanitize_overflow", False):
        interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def spare_types() -> None:
    """Make the shape of a type, and of its tensors, once for all of them; and their common shape once."""
    try:
        from triton.language import block_type, tensor
        from triton.language.semantic import TritonSemantic
    except ImportError:
        return
    make_block, make_tensor, broadcast = block_type.__init__, tensor.__init__, TritonSemantic.broadcast_impl_value
    blocks, shapes, joined = {}, {}, {}

    def init_block(self, element_ty, shape):
        sizes = tuple([getattr(size, "value", size) for size in shape])
        made = blocks.get((element_ty.name, sizes))
        if made is None:
            make_block(self, element_ty, shape)
            self.sizes = sizes
            blocks[element_ty.name, sizes] = dict(vars(self))
        else:
            vars(self).update(made)
            self.element_ty = element_ty

    def init_tensor(self, handle, type):
        sizes = sizes_of(type)
        made = shapes.get(sizes)
        if made is None:
            make_tensor(self, handle, type)
            if sizes is not None:
                own = ("handle", "type", "dtype")
                shapes[sizes] = {name: value for name, value in vars(self).items() if name not in own}
        else:
            vars(self).update(made)
            self.handle, self.type, self.dtype = handle, type, type.scalar

    def sizes_of(type):
        return getattr(type, "sizes", None) if type.is_block() else ()

    def broadcast_impl_value(self, lhs, rhs):
        sizes = sizes_of(lhs.type), sizes_of(rhs.type)
        if None in sizes or sizes[0] != sizes[1] and sizes not in joined:
            lhs, rhs = broadcast(self, lhs, rhs)
            if None not in sizes and (() in sizes or len(sizes[0]) == len(sizes[1])):  # else with new dimensions
                joined[sizes] = sizes_of(lhs.type)
        elif sizes[0] != sizes[1]:
            whole = joined[sizes]
            lhs = lhs if sizes[0] == whole else self.broadcast_impl_shape(lhs, [*whole])
            rhs = rhs if sizes[1] == whole else self.broadcast_impl_shape(rhs, [*whole])
        return lhs, rhs

    block_type.__init__, tensor.__init__ = init_block, init_tensor
    TritonSemantic.broadcast_impl_value = broadcast_impl_value
