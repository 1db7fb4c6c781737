# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, mended, and without what it does again and again: half of its time."""

import inspect


def patch_interpreter() -> None:
    mend_comparisons()
    spare_repetitions()


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
    languages, patched, types = {}, set(), {}

    def patch_lang(fn):
        if fn not in languages:
            found = (value for value in fn.__globals__.values() if inspect.ismodule(value))
            languages[fn] = frozenset(module.__name__ for module in found if module in (tl, tl.core))
        if languages[fn] in patched:
            return interpreter._LangPatchScope()  # with nothing to restore
        patched.add(languages[fn])
        scope = patch(fn)
        restore = scope.restore
        scope.restore = lambda: (patched.clear(), restore())
        return scope

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in types:
            types[name] = numpy_type(dtype)
        return types[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, get_np_dtype
