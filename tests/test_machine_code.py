"""The counting in machine_code.py, on a few lines of machine code."""

import pytest

from machine_code import (
    Rule,
    broken,
    figures_of,
    in_flight,
    loops_of,
    moved,
    parse,
    reading_loop,
    resources,
    writing_loop,
)

# The first loop loads two packs and adds them, or skips that. The second stores a pack in three pieces. The block of
# .L_x_5 serves diverged lanes only, so it belongs to no loop.
SASS = """
\t.section\t.text._Z1fPf,"ax",@progbits
\t.sectioninfo\t@"SHI_REGISTERS=16"
_Z1fPf:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P1 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   BRA.DIV UR4, `(.L_x_5) ;
.L_x_2:
        /*0040*/               @P0 BRA `(.L_x_3) ;
        /*0050*/                   FADD R12, R12, R4 ;
        /*0060*/                   FADD R12, R12, R8 ;
.L_x_3:
        /*0070*/                   IADD3 R2, R2, 0x20, RZ ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
.L_x_4:
        /*0090*/                   LDS.128 R4, [R0] ;
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00b0*/                   STG.E desc[UR4][R2.64+0x8], R6 ;
        /*00c0*/                   STG.E.U16 desc[UR4][R2.64+0xc], R7 ;
        /*00d0*/                   NOP ;
        /*00e0*/               @P3 BRA `(.L_x_4) ;
        /*00f0*/                   STG.E.ENL2.256 desc[UR4][R2.64], R4, R8 ;
        /*00f8*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;
        /*0100*/                   EXIT ;
.L_x_5:
        /*0110*/                   STG.E.U8 desc[UR4][R2.64], R9 ;
        /*0120*/                   BRA `(.L_x_2) ;
.L_x_6:
        /*0130*/                   BRA `(.L_x_6);

\t.section\t.text._Z1gPf,"ax",@progbits
_Z1gPf:
        /*0000*/                   STL [R1], R2 ;
        /*0010*/                   EXIT ;
"""
CODE = parse(SASS)["_Z1fPf"]


def test_functions_and_instructions():
    functions = parse(SASS)
    assert {name: len(code) for name, code in functions.items()} == {"_Z1fPf": 21, "_Z1gPf": 2}
    assert functions["_Z1fPf"][2] == (("", True, "LDG.E.128", "R8, desc[UR4][R2.64+0x10]"))


def test_widths():
    assert moved(CODE, "global", stores=False) == [16, 16]
    assert moved(CODE, "global", stores=True) == [8, 4, 2, 16, 16, 16, 1]
    assert moved(CODE, "global", stores=True, streaming=True) == [16]
    assert moved(CODE, "global", stores=True, streaming=False) == [8, 4, 2, 16, 16, 1]
    assert moved(CODE, "shared", stores=False) == [16]
    assert moved(parse(SASS)["_Z1gPf"], "global", stores=True) == [], "local memory is not global"


def test_loops_by_their_longest_way():
    loops = loops_of(CODE)
    assert [i.op for i in reading_loop(loops)] == ["LDG.E.128"] * 2 + ["BRA.DIV", "BRA", "FADD", "FADD", "IADD3", "BRA"]
    assert [i.op for i in writing_loop(loops)] == ["LDS.128", "STG.E.64", "STG.E", "STG.E.U16", "BRA"]


def test_loads_in_flight():
    load, other_load, _, _, use, other_use, *_ = reading_loop(loops_of(CODE))
    assert in_flight([load, other_load, use, other_use]) == 2
    assert in_flight([load, use, other_load, other_use]) == 1
    assert in_flight([other_load, use, other_use, load]) == 2, "from one iteration to the next"
    assert in_flight([use, other_use]) == 0


def test_resources():
    log = """
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90a'
ptxas info    : Function properties for _Z1fPf
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 16 registers, used 1 barriers, 16 bytes cumulative stack size
"""
    assert resources(log) == {"_Z1fPf": (16, 48)}


class TestRules:
    figures = figures_of(CODE, element=2, used=(16, 0))

    def test_figures(self):
        assert self.figures == (16, 0, 2, 3, 1, 4, 3, 8 * 2 / 32, 5 * 2 / 14, 0)

    @pytest.mark.parametrize(
        "rule, most, change, fault",
        [
            (Rule("f", flight=2, stores=2, narrow=4), 2, {}, "3 narrower stores in the loop that writes the row"),
            (Rule("f", flight=3), 2, {}, "2 loads of 16 bytes in flight, expected 3 or more"),
            (Rule("f", flight=2, stores=4), 2, {}, "3 stores of 16 bytes, expected 4 or more"),
            (Rule("f", flight=2, streaming=2), 2, {}, "1 streaming stores of 16 bytes, expected 2"),
            (Rule("f", flight=2), 2, {}, "1 streaming stores of 16 bytes, expected 0"),
            (Rule("f", flight=2, narrow=3), 2, {}, "4 narrower stores, expected 3 at most"),
            (Rule("f", flight=2), 1, {}, "1.2 instructions per logit, expected 1 at most"),
            (Rule("f", flight=2), 2, {"spilled": 8}, "8 bytes of stack frame or spilled registers"),
            (Rule("f", flight=0, reads_row=True), 2, {"forward": None}, "no loop reads the row by 16 bytes"),
            (Rule("f", flight=0, writes_row=True), 2, {"backward": None}, "no loop writes the row"),
            (Rule("f", flight=0, copies=1), 2, {}, "0 copies of the next row's 16 bytes, expected 1"),
        ],
    )
    def test_each_is_reported(self, rule, most, change, fault):
        assert fault in broken(rule, self.figures._replace(**change), most)

    def test_a_good_kernel(self):
        good = self.figures._replace(narrow=0, narrow_in_loop=0)
        assert broken(Rule("f", flight=2, stores=3, streaming=1, reads_row=True, writes_row=True), good, 2) == []
