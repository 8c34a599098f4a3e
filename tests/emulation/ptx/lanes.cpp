// Instructions that each lane runs by itself, and those that exchange registers within a warp.
#include <immintrin.h>
#include <math.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "machine.h"

namespace ptx {

using u16 = uint16_t;
using s16 = int16_t;
using u32 = uint32_t;
using s32 = int32_t;
using u64 = uint64_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }
uint16_t float_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
uint16_t float_to_bfloat16(float x) {
    if (x != x) return 0x7FFF;
    const u32 bits = __builtin_bit_cast(u32, x);
    return static_cast<u16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

namespace {

// --- a handler from a function of one lane ---

template <class T>
constexpr char kPlace = std::is_same_v<T, bool> ? 'p'
                        : sizeof(T) == 8        ? 'd'
                        : sizeof(T) == 4        ? 'w'
                                                : 'h';

template <class T>
struct Source : Register<T> {
    using Register<T>::Register;
};
template <>
struct Source<bool> {
    u32 bits;
    Source(Warp& warp, int offset) : bits(warp.predicate(offset)) {}
    bool get(int lane) const { return bits >> lane & 1; }
};

template <auto function, class Signature = decltype(+function)>
struct Operation;
template <auto function, class Result, class... Arguments>
struct Operation<function, Result (*)(Arguments...)> {
    static constexpr char kPlaces[] = {kPlace<Result>, kPlace<Arguments>..., 0};

    static Status run(Warp& warp, const Instruction& i, uint32_t mask) {
        return run_with(warp, i, mask, std::index_sequence_for<Arguments...>());
    }
    template <size_t... n>
    static Status run_with(Warp& warp, const Instruction& i, uint32_t mask, std::index_sequence<n...>) {
        const int offsets[] = {i.a, i.b, i.c, i.e};
        const std::tuple<Source<Arguments>...> sources{Source<Arguments>(warp, offsets[n])...};
        if constexpr (std::is_same_v<Result, bool>) {
            u32 result = 0;
            for (int l = 0; l < 32; ++l) result |= u32{function(std::get<n>(sources).get(l)...)} << l;
            warp.set_predicate(i.d, mask, result);
        } else {
            Register<Result> target(warp, i.d);
            for_independent_lanes(mask, [&](int l) { target.set(l, function(std::get<n>(sources).get(l)...)); });
        }
        return Status::next;
    }
};
template <auto function>
constexpr Form form(Kind kind) {
    return {Operation<function>::run, Operation<function>::kPlaces, kind};
}

// Of all lanes' predicates at once.
template <auto function>
Status run_predicates(Warp& warp, const Instruction& i, uint32_t mask) {
    warp.set_predicate(i.d, mask, function(warp.predicate(i.a), i.b >= 0 ? warp.predicate(i.b) : 0));
    return Status::next;
}

// --- functions of a lane ---

f32 flush(f32 x) { return fabsf(x) < std::numeric_limits<f32>::min() ? copysignf(0, x) : x; }

// A NaN gives way to a number, and -0 is less than 0.
template <bool is_max>
f32 extreme(f32 a, f32 b) {
    if (a != a && b != b) return __builtin_bit_cast(f32, 0x7FFFFFFFu);
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return static_cast<bool>(signbit(a)) == is_max ? b : a;
    return (a > b) == is_max ? a : b;
}

// Rounds down. The product is exact in float64, and `error` is what the sum in float64 lost.
f32 fma_down(f32 a, f32 b, f32 c) {
    const f64 product = static_cast<f64>(a) * b, sum = product + c;
    const f64 added = sum - product, error = (product - (sum - added)) + (c - added);
    const f32 nearest = static_cast<f32>(sum);
    return nearest > sum || (nearest == sum && error < 0) ? nextafterf(nearest, -INFINITY) : nearest;
}

// Division by zero has the result of the hardware; it is undefined in the ISA.
template <class T>
T divide(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(std::make_unsigned_t<T>(0) - a);
    return a / b;
}
template <class T>
T remainder(T a, T b) {
    if (b == 0) return a;
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? 0 : a % b;
}

// The low `length` bits of a, put into b at bit `at`.
template <class T>
T insert_bits(T a, T b, u32 at, u32 length) {
    constexpr u32 bits = 8 * sizeof(T);
    at &= 0xFF;
    length &= 0xFF;
    if (at >= bits) return b;
    const T field = (length >= bits ? ~T{0} : (T{1} << length) - 1) << at;
    return (b & ~field) | (a << at & field);
}

using Table = std::unordered_map<std::string, Form>;

template <class T>
void add_comparisons(Table& t, const std::string& type, Kind kind) {
    t["setp.eq." + type] = form<[](T a, T b) { return a == b; }>(kind);
    t["setp.lt." + type] = form<[](T a, T b) { return a < b; }>(kind);
    t["setp.le." + type] = form<[](T a, T b) { return a <= b; }>(kind);
    t["setp.gt." + type] = form<[](T a, T b) { return b < a; }>(kind);
    t["setp.ge." + type] = form<[](T a, T b) { return a >= b; }>(kind);
    if constexpr (std::is_floating_point_v<T>) {   // with u: true where one is NaN
        t["setp.ne." + type] = form<[](T a, T b) { return a < b || b < a; }>(kind);
        t["setp.equ." + type] = form<[](T a, T b) { return !(a < b || b < a); }>(kind);
        t["setp.neu." + type] = form<[](T a, T b) { return a != b; }>(kind);
        t["setp.ltu." + type] = form<[](T a, T b) { return !(a >= b); }>(kind);
        t["setp.leu." + type] = form<[](T a, T b) { return !(b < a); }>(kind);
        t["setp.gtu." + type] = form<[](T a, T b) { return !(a <= b); }>(kind);
        t["setp.geu." + type] = form<[](T a, T b) { return !(a < b); }>(kind);
        t["setp.nan." + type] = form<[](T a, T b) { return a != a || b != b; }>(kind);
        t["setp.num." + type] = form<[](T a, T b) { return a == a && b == b; }>(kind);
    } else {
        t["setp.ne." + type] = form<[](T a, T b) { return a != b; }>(kind);
    }
}

template <class T>
void add_bitwise(Table& t, const std::string& bits) {
    t["and.b" + bits] = form<[](T a, T b) { return static_cast<T>(a & b); }>(Kind::integer);
    t["or.b" + bits] = form<[](T a, T b) { return static_cast<T>(a | b); }>(Kind::integer);
    t["xor.b" + bits] = form<[](T a, T b) { return static_cast<T>(a ^ b); }>(Kind::integer);
    t["not.b" + bits] = form<[](T a) { return static_cast<T>(~a); }>(Kind::integer);
    t["shl.b" + bits] =
        form<[](T a, u32 b) { return b < 8 * sizeof(T) ? static_cast<T>(a << b) : T{0}; }>(Kind::integer);
    t["shr.u" + bits] = t["shr.b" + bits] =
        form<[](T a, u32 b) { return b < 8 * sizeof(T) ? static_cast<T>(a >> b) : T{0}; }>(Kind::integer);
    using Signed = std::make_signed_t<T>;
    t["shr.s" + bits] =
        form<[](Signed a, u32 b) { return static_cast<Signed>(a >> std::min<u32>(b, 8 * sizeof(T) - 1)); }>(
            Kind::integer);
    for (const char* type : {"selp.b", "selp.u", "selp.s", "selp.f"}) {
        t[type + bits] = form<[](T a, T b, bool first) { return first ? a : b; }>(Kind::integer);
    }
}

template <class T>
void add_integers(Table& t, const std::string& bits) {
    using Signed = std::make_signed_t<T>;
    for (const char* sign : {".s", ".u"}) {
        const std::string type = sign + bits;
        t["add" + type] = form<[](T a, T b) { return static_cast<T>(a + b); }>(Kind::integer);
        t["sub" + type] = form<[](T a, T b) { return static_cast<T>(a - b); }>(Kind::integer);
        t["mul.lo" + type] = form<[](T a, T b) { return static_cast<T>(u64{a} * b); }>(Kind::integer);
    }
    t["neg.s" + bits] = form<[](T a) { return static_cast<T>(0 - a); }>(Kind::integer);
    t["min.s" + bits] = form<[](Signed a, Signed b) { return std::min(a, b); }>(Kind::integer);
    t["max.s" + bits] = form<[](Signed a, Signed b) { return std::max(a, b); }>(Kind::integer);
    t["min.u" + bits] = form<[](T a, T b) { return std::min(a, b); }>(Kind::integer);
    t["max.u" + bits] = form<[](T a, T b) { return std::max(a, b); }>(Kind::integer);
    t["div.s" + bits] = form<[](Signed a, Signed b) { return divide(a, b); }>(Kind::integer);
    t["div.u" + bits] = form<[](T a, T b) { return divide(a, b); }>(Kind::integer);
    t["rem.s" + bits] = form<[](Signed a, Signed b) { return remainder(a, b); }>(Kind::integer);
    t["rem.u" + bits] = form<[](T a, T b) { return remainder(a, b); }>(Kind::integer);
}

template <class T>
void add_floats(Table& t, const std::string& type, Kind kind) {
    for (const char* rounding : {".", ".rn."}) {
        t["add" + (rounding + type)] = form<[](T a, T b) { return a + b; }>(kind);
        t["sub" + (rounding + type)] = form<[](T a, T b) { return a - b; }>(kind);
        t["mul" + (rounding + type)] = form<[](T a, T b) { return a * b; }>(kind);
    }
    const Kind slow = sizeof(T) == 4 ? Kind::special : kind;
    t["fma.rn." + type] = form<[](T a, T b, T c) { return std::fma(a, b, c); }>(kind);
    t["div.rn." + type] = form<[](T a, T b) { return a / b; }>(slow);
    t["rcp.rn." + type] = form<[](T a) { return 1 / a; }>(slow);
    t["sqrt.rn." + type] = form<[](T a) { return std::sqrt(a); }>(slow);
    t["neg." + type] = form<[](T a) { return -a; }>(kind);
    t["abs." + type] = form<[](T a) { return std::fabs(a); }>(kind);
    t["copysign." + type] = form<[](T sign, T a) { return std::copysign(a, sign); }>(kind);
}

Table make_table() {
    Table t;
    add_bitwise<u16>(t, "16");
    add_bitwise<u32>(t, "32");
    add_bitwise<u64>(t, "64");
    add_integers<u16>(t, "16");
    add_integers<u32>(t, "32");
    add_integers<u64>(t, "64");
    for (const char* unsigned_type : {"u", "b"}) {
        add_comparisons<u16>(t, std::string(unsigned_type) + "16", Kind::integer);
        add_comparisons<u32>(t, std::string(unsigned_type) + "32", Kind::integer);
        add_comparisons<u64>(t, std::string(unsigned_type) + "64", Kind::integer);
    }
    add_comparisons<s16>(t, "s16", Kind::integer);
    add_comparisons<s32>(t, "s32", Kind::integer);
    add_comparisons<s64>(t, "s64", Kind::integer);
    add_comparisons<f32>(t, "f32", Kind::fp32);
    add_comparisons<f64>(t, "f64", Kind::fp64);
    add_floats<f32>(t, "f32", Kind::fp32);
    add_floats<f64>(t, "f64", Kind::fp64);

    t["mul.hi.s32"] = form<[](s32 a, s32 b) { return static_cast<s32>(s64{a} * b >> 32); }>(Kind::integer);
    t["mul.hi.u32"] = form<[](u32 a, u32 b) { return static_cast<u32>(u64{a} * b >> 32); }>(Kind::integer);
    t["mul.wide.s16"] = form<[](s16 a, s16 b) { return s32{a} * b; }>(Kind::integer);
    t["mul.wide.u16"] = form<[](u16 a, u16 b) { return u32{a} * b; }>(Kind::integer);
    t["mul.wide.s32"] = form<[](s32 a, s32 b) { return s64{a} * b; }>(Kind::integer);
    t["mul.wide.u32"] = form<[](u32 a, u32 b) { return u64{a} * b; }>(Kind::integer);
    t["mad.lo.s32"] = form<[](u32 a, u32 b, u32 c) { return a * b + c; }>(Kind::integer);
    t["bfi.b32"] = form<[](u32 a, u32 b, u32 at, u32 length) { return insert_bits(a, b, at, length); }>(Kind::integer);
    t["bfi.b64"] = form<[](u64 a, u64 b, u32 at, u32 length) { return insert_bits(a, b, at, length); }>(Kind::integer);
    t["popc.b32"] = form<[](u32 a) { return static_cast<u32>(__builtin_popcount(a)); }>(Kind::integer);

    t["and.pred"] = {run_predicates<[](u32 a, u32 b) { return a & b; }>, "ppp", Kind::predicate};
    t["or.pred"] = {run_predicates<[](u32 a, u32 b) { return a | b; }>, "ppp", Kind::predicate};
    t["xor.pred"] = {run_predicates<[](u32 a, u32 b) { return a ^ b; }>, "ppp", Kind::predicate};
    t["not.pred"] = {run_predicates<[](u32 a, u32) { return ~a; }>, "pp", Kind::predicate};

    t["fma.rm.f32"] = form<[](f32 a, f32 b, f32 c) { return fma_down(a, b, c); }>(Kind::fp32);
    t["max.f32"] = form<[](f32 a, f32 b) { return extreme<true>(a, b); }>(Kind::fp32);
    t["min.f32"] = form<[](f32 a, f32 b) { return extreme<false>(a, b); }>(Kind::fp32);

    // The special function unit, from float64; .ftz takes and gives 0 for subnormals.
    t["ex2.approx.f32"] = form<[](f32 a) { return static_cast<f32>(exp2(f64{a})); }>(Kind::special);
    t["ex2.approx.ftz.f32"] = form<[](f32 a) { return flush(static_cast<f32>(exp2(f64{flush(a)}))); }>(Kind::special);
    t["lg2.approx.f32"] = form<[](f32 a) { return static_cast<f32>(log2(f64{a})); }>(Kind::special);
    t["lg2.approx.ftz.f32"] = form<[](f32 a) { return static_cast<f32>(log2(f64{flush(a)})); }>(Kind::special);
    t["rcp.approx.ftz.f32"] = form<[](f32 a) { return flush(1 / flush(a)); }>(Kind::special);
    t["rcp.approx.ftz.f64"] = form<[](f64 a) {   // the upper half alone
        return __builtin_bit_cast(f64, __builtin_bit_cast(u64, 1 / a) & 0xFFFFFFFF00000000);
    }>(Kind::special);
    t["sqrt.approx.f32"] = form<[](f32 a) { return sqrtf(a); }>(Kind::special);
    t["rsqrt.approx.f32"] = form<[](f32 a) { return static_cast<f32>(1 / sqrt(f64{a})); }>(Kind::special);
    t["rsqrt.approx.ftz.f32"] =
        form<[](f32 a) { return flush(static_cast<f32>(1 / sqrt(f64{flush(a)}))); }>(Kind::special);
    t["tanh.approx.f32"] = form<[](f32 a) { return static_cast<f32>(tanh(f64{a})); }>(Kind::special);

    t["cvt.f32.f16"] = form<[](u16 a) { return half_to_float(a); }>(Kind::convert);
    t["cvt.rn.f16.f32"] = form<[](f32 a) { return float_to_half(a); }>(Kind::convert);
    t["cvt.rn.bf16.f32"] = form<[](f32 a) { return float_to_bfloat16(a); }>(Kind::convert);
    t["cvt.rn.f16x2.f32"] =
        form<[](f32 high, f32 low) { return u32{float_to_half(high)} << 16 | float_to_half(low); }>(Kind::convert);
    t["cvt.rn.bf16x2.f32"] =
        form<[](f32 high, f32 low) { return u32{float_to_bfloat16(high)} << 16 | float_to_bfloat16(low); }>(
            Kind::convert);
    t["cvt.sat.f32.f32"] = form<[](f32 a) { return 0 < a ? std::min(a, 1.f) : 0.f; }>(Kind::convert);
    t["cvt.f64.f32"] = form<[](f32 a) { return f64{a}; }>(Kind::convert);
    t["cvt.rn.f32.f64"] = form<[](f64 a) { return static_cast<f32>(a); }>(Kind::convert);
    t["cvt.rn.f32.s32"] = form<[](s32 a) { return static_cast<f32>(a); }>(Kind::convert);
    t["cvt.rn.f32.u32"] = form<[](u32 a) { return static_cast<f32>(a); }>(Kind::convert);
    t["cvt.rn.f64.s32"] = form<[](s32 a) { return f64(a); }>(Kind::convert);
    t["cvt.rn.f64.s64"] = form<[](s64 a) { return static_cast<f64>(a); }>(Kind::convert);
    t["cvt.rzi.f64.f64"] = form<[](f64 a) { return trunc(a); }>(Kind::convert);
    t["cvt.s64.s32"] = form<[](s32 a) { return s64{a}; }>(Kind::integer);
    t["cvt.u64.u32"] = form<[](u32 a) { return u64{a}; }>(Kind::integer);
    t["cvt.u32.u64"] = form<[](u64 a) { return static_cast<u32>(a); }>(Kind::integer);
    t["cvt.u16.u32"] = form<[](u32 a) { return static_cast<u16>(a); }>(Kind::integer);
    t["cvt.u32.u16"] = form<[](u16 a) { return u32{a}; }>(Kind::integer);
    t["cvt.s32.s16"] = form<[](s16 a) { return s32{a}; }>(Kind::integer);
    return t;
}

}   // namespace

const Form* find_form(const std::string& opcode) {
    static const Table table = make_table();
    const auto found = table.find(opcode);
    return found == table.end() ? nullptr : &found->second;
}

// --- moves ---

Status handlers::move32(Warp& warp, const Instruction& i, uint32_t mask) {
    return Operation<[](u32 a) { return a; }>::run(warp, i, mask);
}
Status handlers::move64(Warp& warp, const Instruction& i, uint32_t mask) {
    return Operation<[](u64 a) { return a; }>::run(warp, i, mask);
}
Status handlers::move_predicate(Warp& warp, const Instruction& i, uint32_t mask) {
    return run_predicates<[](u32 a, u32) { return a; }>(warp, i, mask);
}
Status handlers::low32(Warp& warp, const Instruction& i, uint32_t mask) {
    return Operation<[](u64 a) { return static_cast<u32>(a); }>::run(warp, i, mask);
}
Status handlers::low16(Warp& warp, const Instruction& i, uint32_t mask) {
    return Operation<[](u32 a) { return static_cast<u16>(a); }>::run(warp, i, mask);
}
Status handlers::zero_extend(Warp& warp, const Instruction& i, uint32_t mask) {
    return Operation<[](u32 a) { return u64{a}; }>::run(warp, i, mask);
}
Status handlers::sign_extend(Warp& warp, const Instruction& i, uint32_t mask) {
    return Operation<[](s32 a) { return s64{a}; }>::run(warp, i, mask);
}
Status handlers::add64(Warp& warp, const Instruction& i, uint32_t mask) {
    return Operation<[](u64 a, u64 b) { return a + b; }>::run(warp, i, mask);
}
Status handlers::pack32(Warp& warp, const Instruction& i, uint32_t mask) {
    return Operation<[](u16 a, u16 b) { return a | u32{b} << 16; }>::run(warp, i, mask);
}
Status handlers::pack64(Warp& warp, const Instruction& i, uint32_t mask) {
    return Operation<[](u32 a, u32 b) { return a | u64{b} << 32; }>::run(warp, i, mask);
}
Status handlers::unpack32(Warp& warp, const Instruction& i, uint32_t mask) {
    std::array<u32, 32> values;   // a target may be the source
    memcpy(values.data(), warp.registers + i.a, sizeof values);
    for_lanes(mask, [&](int l) {
        if (i.d >= 0) Register<u16>(warp, i.d).set(l, static_cast<u16>(values[l]));
        if (i.b >= 0) Register<u16>(warp, i.b).set(l, static_cast<u16>(values[l] >> 16));
    });
    return Status::next;
}
Status handlers::unpack64(Warp& warp, const Instruction& i, uint32_t mask) {
    const Register<u64> a(warp, i.a);
    for_lanes(mask, [&](int l) {
        if (i.d >= 0) Register<u32>(warp, i.d).set(l, static_cast<u32>(a.get(l)));
        if (i.b >= 0) Register<u32>(warp, i.b).set(l, static_cast<u32>(a.get(l) >> 32));
    });
    return Status::next;
}

// --- within a warp ---

Status handlers::shfl(Warp& warp, const Instruction& i, uint32_t mask) {
    u32 values[32], results[32], valid = 0;
    memcpy(values, warp.registers + i.a, sizeof values);
    for_lanes(mask, [&](int l) {
        const int b = Register<s32>(warp, i.b).get(l) & 31, c = Register<s32>(warp, i.c).get(l);
        const int segment = c >> 8 & 31, clamp = c & 31;
        const int first = l & segment, last = first | (clamp & ~segment);
        const int candidates[] = {l - b, l + b, l ^ b, first | (b & ~segment)};
        const int lane = candidates[i.width];
        const bool inside = i.width == 0 ? lane >= last : lane <= last;
        const int from = inside ? lane : l;
        if (!(mask >> from & 1)) fail("shfl: lane %d reads lane %d, which takes no part", l, from);
        results[l] = values[from];
        valid |= u32{inside} << l;
    });
    for_lanes(mask, [&](int l) { Register<u32>(warp, i.d).set(l, results[l]); });
    if (i.e >= 0) warp.set_predicate(i.e, mask, valid);
    return Status::next;
}
Status handlers::vote(Warp& warp, const Instruction& i, uint32_t mask) {
    const u32 set = warp.predicate(i.a) & mask;
    if (i.width == 2) {
        for_lanes(mask, [&](int l) { Register<u32>(warp, i.d).set(l, set); });
    } else {
        const bool result = i.width == 0 ? set == mask : set != 0;
        warp.set_predicate(i.d, mask, result ? kAllLanes : 0);
    }
    return Status::next;
}
Status handlers::elect(Warp& warp, const Instruction& i, uint32_t mask) {
    warp.set_predicate(i.d, mask, mask & -mask);
    return Status::next;
}

}   // namespace ptx
