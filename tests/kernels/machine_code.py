# SPDX-License-Identifier: Apache-2.0
"""What is wrong in machine code for Hopper, as `nvdisasm -c` prints it."""

import re
import struct


ZERO = (frozenset(), 0)


def parse(text):
    """Instructions as `(guard, name, operands)`, and the numbers of those that labels precede."""
    code, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*\w+\*/\s+(?:@(!?\w+) +)?(\S+) *(.*);", line):
            code.append((*found.groups()[:2], [x.strip().removesuffix(".reuse") for x in found[3].split(",")]))
    return code, labels


def early_accesses(text):
    """Accesses to global memory that some path reaches before it has waited for the kernels before."""
    code, labels = parse(text)
    reached, work = {0}, [0]
    while work:
        number = work.pop()
        if code[number][1] != "ACQBULK":
            new = {x for x in followers(number, code[number], labels) if x < len(code)} - reached
            reached |= new
            work += new
    access = re.compile(r"(LDG|LDGSTS|LD|STG|ST|ATOM|ATOMG|RED|REDG|UTMALDG|UTMASTG|UTMAREDG|UTMAPF|UBLK\w+)(\.|$)")
    return [code[number] for number in sorted(reached) if access.match(code[number][1])]


def uncertain_descriptors(text):
    """How many products of warp groups there are, and those of which a descriptor of shared memory may lack its upper
    half on some path. ptxas of CUDA 12.8 has left some out where a branch chose between one product and two.

    By propagation of constants through registers. A known value is a constant, or the exclusive or of one and of
    unknown registers (two registers are swapped that way). Lower halves are taken to have no carry.
    """
    code, labels = parse(text)
    before, work = {0: {}}, [0]
    while work:
        number = work.pop()
        known = after(number, code[number], before[number])
        for other in followers(number, code[number], labels):
            joined = common(known, before[other]) if other in before else known
            if other < len(code) and before.get(other) != joined:
                before[other] = joined
                work.append(other)
    products = [number for number, (_, name, _) in enumerate(code) if name.startswith("HGMMA")]
    uncertain = []
    for number in products:
        first = int(re.search(r"gdesc\[UR(\d+)\]", str(code[number]))[1])
        halves = [value_of(f"UR{first + part}", 0, before.get(number, {})) for part in (1, 3)]
        # The highest bits say how tiles are swizzled, which all of these are.
        if any(unknown or not upper >> 30 for unknown, upper in halves):
            uncertain.append(number)
    return len(products), uncertain


def common(one, two):
    return {register: x for register, x in one.items() if two.get(register) == x}


def followers(number, instruction, labels):
    guard, name, operands = instruction
    jumps = [labels[x] for x in re.findall(r"\.L_\w+", str(operands))] if name in ("BRA", "BRX") else []
    always = name in ("BRX", "EXIT", "RET") or name == "BRA" and len(operands) == 1
    return jumps + ([] if always and not guard else [number + 1])


def value_of(operand, upper, known):
    """An operand's value, None for what is neither a register nor a number; with `upper` of its upper 32 bits."""
    if register := re.fullmatch(r"(U?R)(\d+)", operand):
        place = register[1], int(register[2]) + upper
        return known.get(place, (frozenset([place]), 0))
    if re.fullmatch(r"-?U?RZ|SRZ", operand):
        return ZERO
    return (frozenset(), 0 if upper else int(operand, 16) % 2**32) if re.fullmatch(r"-?0x\w+", operand) else None


def half_bits(number):
    return int.from_bytes(struct.pack("<e", float(number)), "little")


def result_of(name, operands, upper, known):
    """What an instruction writes, None if that is unknown."""
    if name == "HFMA2.MMA" and operands[:2] == ["-RZ", "RZ"]:  # two halves of a constant
        return frozenset(), half_bits(operands[2]) << 16 | half_bits(operands[3])
    parts = [value_of(x, upper, known) for x in operands if not re.match("!?U?P", x)]
    if None in parts:
        return None
    if re.match(r"U?LOP3\.LUT$", name) and operands[2] in ("RZ", "URZ") and operands[3] == "0x3c":
        return parts[0][0] ^ parts[1][0], parts[0][1] ^ parts[1][1]
    if re.match(r"IMAD(\.MOV\.U32|\.U32|\.X)$", name) and parts[:2] == [ZERO, ZERO]:
        parts = parts[2:]
    elif not re.match(r"U?MOV$|R2UR$|U?IADD3|CS2R$", name):
        return None
    parts = [x for x in parts if x != ZERO] or [ZERO]
    if len(parts) > 1 and any(unknown for unknown, _ in parts):
        return None
    return parts[0] if len(parts) == 1 else (frozenset(), sum(x for _, x in parts) % 2**32)


def after(number, instruction, known):
    """What is known behind an instruction."""
    guard, name, operands = instruction
    operands = operands[operands[0][:1] == "P" :]
    target = re.fullmatch(r"(U?R)(\d+)", operands[0]) if operands else None
    if not target:
        return known
    kind, first = target[1], int(target[2])
    wide = 4 if re.search("128|LDSM", name) else 2 if re.search("64|WIDE|^CS2R", name) else 1
    product = re.match(r"HGMMA\.64x(\d+)x", name)
    count = int(product[1]) // 2 if product else wide
    new = known | {(kind, first + part): (frozenset([(number, part)]), 0) for part in range(count)}
    for part in {"UIADD3.64": [1], "CS2R": [0, 1]}.get(name, [0] if count == 1 else []):
        new[kind, first + part] = result_of(name, operands[1:], part, known) or new[kind, first + part]
    return common(new, known) if guard else new
