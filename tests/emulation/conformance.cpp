// Compares csrc/emulation/fragments.h and csrc/cuda/ptx/layouts.h with CuTe's layouts, element by element. Host
// code; prints "name mismatches/total", a line a check. test_conformance.py compiles it, and holds the names.
#include <cstdint>
#include <cstdio>
#include <string>

// Gives CuTe the addresses for its descriptors: `tile` lies in shared memory, at tile_address.
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
constexpr uint32_t tile_address = 0x25400;   // a multiple of 1024 that uses the descriptor's highest bit
alignas(1024) static unsigned char tile[64 * 1024];
static uint32_t __cvta_generic_to_shared(const void* pointer) {
    return tile_address + static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - tile);
}

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "emulation/fragments.h"

using namespace cute;
using nanochat::emulation::Place;
namespace device = nanochat::device;
namespace ours = nanochat::emulation;
namespace gmma = SM90::GMMA;

class Check {
  public:
    explicit Check(std::string name) : name(std::move(name)) {}
    ~Check() { printf("%s %d/%d\n", name.c_str(), mismatches, total); }
    void same(uint64_t a, uint64_t b) {
        ++total;
        mismatches += a != b;
    }

  private:
    std::string name;
    int mismatches = 0, total = 0;
};

// --- fragments: (thread, value) -> element, columns of `rows` elements one after the other ---

template <class Layout, class Map>
void check_fragment(const std::string& name, int rows, Map map) {
    const Layout layout;
    Check check(name);
    for (int thread = 0; thread < size<0>(layout); ++thread) {
        for (int i = 0; i < size<1>(layout); ++i) {
            const Place place = map(thread, i);
            check.same(place.row + rows * place.column, layout(thread, i));
        }
    }
}

template <class Operation>
void check_mma(const std::string& suffix) {
    using Traits = MMA_Traits<Operation>;
    check_fragment<typename Traits::ALayout>("mma_a_" + suffix, 16, ours::mma_a);
    // CuTe's B is (N, K).
    check_fragment<typename Traits::BLayout>("mma_b_" + suffix, 8, [](int lane, int i) {
        const Place place = ours::mma_b(lane, i);
        return Place{place.column, place.row};
    });
    check_fragment<typename Traits::CLayout>("mma_d_" + suffix, 16, ours::mma_d);
}

template <int... eighths>
void check_wgmma_d(std::integer_sequence<int, eighths...>) {
    (check_fragment<gmma::CLayout_64xN<8 * (eighths + 1)>>("wgmma_d_n" + std::to_string(8 * (eighths + 1)), 64,
                                                           ours::wgmma_d),
     ...);
}

using WgmmaBfloat16 = MMA_Traits<SM90_64x128x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K>>;
using WgmmaFloat16 = MMA_Traits<SM90_64x128x16_F32F16F16_RS<gmma::Major::K, gmma::Major::K>>;
static_assert(std::is_same_v<WgmmaBfloat16::CLayout, gmma::CLayout_64xN<128>>);
static_assert(std::is_same_v<WgmmaFloat16::CLayout, gmma::CLayout_64xN<128>>);

// --- ldmatrix, stmatrix: both layouts give bits, of rows of 128 in memory and of values in registers ---

template <class Rows, class Registers>
void check_matrices(const std::string& name, bool transposed) {
    const Rows rows;
    const Registers registers;
    Check check(name);
    for (int lane = 0; lane < size<0>(registers); ++lane) {
        for (int bit = 0; bit < size<1>(registers); ++bit) {
            const int matrix = bit / 32;
            const Place place = ours::ldmatrix_place(lane, bit / 16 % 2, transposed);
            check.same(rows(8 * matrix + place.row, 16 * place.column + bit % 16), registers(lane, bit));
        }
    }
}
template <class Operation>
void check_load(const std::string& name, bool transposed) {
    using Traits = Copy_Traits<Operation>;
    check_matrices<typename Traits::SrcLayout, typename Traits::DstLayout>("ldmatrix_" + name, transposed);
}
template <class Operation>
void check_store(const std::string& name, bool transposed) {
    using Traits = Copy_Traits<Operation>;
    check_matrices<typename Traits::DstLayout, typename Traits::SrcLayout>("stmatrix_" + name, transposed);
}

// --- swizzles and descriptors ---

using Element = cute::bfloat16_t;   // the layouts know its size only

template <device::Swizzle, gmma::Major>
struct AtomOf;
template <gmma::Major major>
struct AtomOf<device::Swizzle::none, major> {
    using type = gmma::Layout_INTER_Atom<Element, major>;
};
template <gmma::Major major>
struct AtomOf<device::Swizzle::bytes32, major> {
    using type = gmma::Layout_SW32_Atom<Element, major>;
};
template <gmma::Major major>
struct AtomOf<device::Swizzle::bytes64, major> {
    using type = gmma::Layout_SW64_Atom<Element, major>;
};
template <gmma::Major major>
struct AtomOf<device::Swizzle::bytes128, major> {
    using type = gmma::Layout_SW128_Atom<Element, major>;
};

// Tiles in one swizzle and major order: a tile of tile_mn x tile_k elements is made of atoms that follow each other
// along one dimension first; its parts of part_mn x 16 elements are operands of instructions.
template <device::Swizzle swizzle, device::Major major>
class Tiles {
  public:
    explicit Tiles(std::string name) : name(std::move(name)) {
        check_atom();
        constexpr int tiles[][3] = {{8, 64, 8},     {64, 64, 64},    {64, 128, 64}, {128, 64, 64},
                                    {192, 128, 64}, {192, 128, 192}, {256, 64, 64}, {256, 64, 256}};
        for (const auto& [tile_mn, tile_k, part_mn] : tiles) {
            if (part_mn % atom_mn == 0) {
                check_addresses<MnFirst>("mn_first", tile_mn, tile_k, part_mn);
                check_addresses<KFirst>("k_first", tile_mn, tile_k, part_mn);
            }
        }
        check_descriptors<MnFirst, 256, 128, 128>("mn_first");
        check_descriptors<KFirst, 256, 64, 128>("k_first");
    }

  private:
    static constexpr bool k_major = major == device::Major::k, plain = swizzle == device::Swizzle::none;
    static constexpr gmma::Major cute_major = k_major ? gmma::Major::K : gmma::Major::MN;
    using Atom = typename AtomOf<swizzle, cute_major>::type;
    using MnFirst = Step<_1, _2>;
    using KFirst = Step<_2, _1>;

    static constexpr int width = device::swizzle_bytes(swizzle), atom_bytes = 8 * width;
    static constexpr int atom_mn = k_major ? 8 : width / 2, atom_k = k_major ? width / 2 : 8;

    // The descriptor's leading is the distance between atoms along K and its stride that along MN, or the reverse.
    static constexpr bool leads_along_k = k_major || plain;

    // Ours, of the part whose first element is (mn, k).
    template <class Order>
    static uint64_t descriptor(int tile_mn, int tile_k, int mn, int k) {
        constexpr bool mn_first = std::is_same_v<Order, MnFirst>;
        const int along_mn = mn_first ? atom_bytes : tile_k / atom_k * atom_bytes;
        const int along_k = mn_first ? tile_mn / atom_mn * atom_bytes : atom_bytes;
        const int inside = 2 * (k_major ? k % atom_k : mn % atom_mn);
        return device::wgmma_descriptor(tile_address + mn / atom_mn * along_mn + k / atom_k * along_k + inside,
                                        leads_along_k ? along_k : along_mn, leads_along_k ? along_mn : along_k,
                                        swizzle);
    }

    void check_atom() {
        const auto layout = as_position_independent_swizzle_layout(Atom{});
        Check check("swizzle_" + name);
        for (int mn = 0; mn < atom_mn; ++mn) {
            for (int k = 0; k < atom_k; ++k) {
                const int byte = k_major ? mn * width + 2 * k : k * width + 2 * mn;
                check.same(device::swizzled(byte, swizzle), 2 * layout(mn, k));
            }
        }
    }

    // Our descriptors of all parts must lead to every element where CuTe has it.
    template <class Order>
    void check_addresses(const std::string& order, int tile_mn, int tile_k, int part_mn) {
        const auto layout = tile_to_shape(Atom{}, make_shape(tile_mn, tile_k), Order{});
        const auto places = as_position_independent_swizzle_layout(layout);
        Check check("address_" + name + "_" + std::to_string(tile_mn) + "x" + std::to_string(tile_k) + "_" + order +
                    "_by_" + std::to_string(part_mn));
        for (int mn = 0; mn < tile_mn; ++mn) {
            for (int k = 0; k < tile_k; ++k) {
                const int mn0 = mn / part_mn * part_mn, k0 = k / 16 * 16;
                const uint64_t ours_of_part = descriptor<Order>(tile_mn, tile_k, mn0, k0);
                check.same(ours::wgmma_address(ours_of_part, major, mn - mn0, k - k0),
                           tile_address + 2 * places(mn, k));
            }
        }
    }

    // The fields of CuTe's descriptors must be ours. Not compared: the distance along a dimension in which the part has
    // one atom, which the instruction does not read; of swizzled K-major tiles this is always the leading one.
    template <class Order, int tile_mn, int tile_k, int part_mn>
    void check_descriptors(const std::string& order) {
        const auto layout = tile_to_shape(Atom{}, Shape<Int<tile_mn>, Int<tile_k>>{}, Order{});
        const auto tensor = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(tile)), layout);
        const auto part = tensor.compose(Layout<Int<part_mn>>{}, Layout<_16>{});
        const gmma::DescriptorIterator first{gmma::make_gmma_desc<cute_major>(part)};

        const std::string suffix = "_" + name + "_" + order;
        Check start("descriptor_start" + suffix), layout_type("descriptor_swizzle" + suffix);
        Check base_offset("descriptor_base_offset" + suffix);
        for (int mn = 0; mn < tile_mn; mn += part_mn) {
            for (int k = 0; k < tile_k; k += 16) {
                const GmmaDescriptor a = descriptor<Order>(tile_mn, tile_k, mn, k);
                const GmmaDescriptor b = *(first + tensor.layout()(mn, k) * sizeof(Element) / 16);
                start.same(a.bitfield.start_address_, b.bitfield.start_address_);
                layout_type.same(a.bitfield.layout_type_, b.bitfield.layout_type_);
                base_offset.same(a.bitfield.base_offset_, b.bitfield.base_offset_);
            }
        }
        const bool along_mn_is_read = part_mn > atom_mn, along_k_is_read = 16 > atom_k;
        const GmmaDescriptor a = descriptor<Order>(tile_mn, tile_k, 0, 0), b = *first;
        if (leads_along_k ? along_k_is_read : along_mn_is_read) {
            Check("descriptor_leading" + suffix).same(a.bitfield.leading_byte_offset_, b.bitfield.leading_byte_offset_);
        }
        if (leads_along_k ? along_mn_is_read : along_k_is_read) {
            Check("descriptor_stride" + suffix).same(a.bitfield.stride_byte_offset_, b.bitfield.stride_byte_offset_);
        }
    }

    const std::string name;
};

int main() {
    check_mma<SM80_16x8x16_F32BF16BF16F32_TN>("bfloat16");
    check_mma<SM80_16x8x16_F32F16F16F32_TN>("float16");

    check_fragment<WgmmaBfloat16::ALayout>("wgmma_a_bfloat16", 64, ours::wgmma_a);
    check_fragment<WgmmaFloat16::ALayout>("wgmma_a_float16", 64, ours::wgmma_a);
    check_wgmma_d(std::make_integer_sequence<int, 32>{});

    check_load<SM75_U32x1_LDSM_N>("x1", false);
    check_load<SM75_U32x2_LDSM_N>("x2", false);
    check_load<SM75_U32x4_LDSM_N>("x4", false);
    check_load<SM75_U16x2_LDSM_T>("x1_trans", true);
    check_load<SM75_U16x4_LDSM_T>("x2_trans", true);
    check_load<SM75_U16x8_LDSM_T>("x4_trans", true);
    check_store<SM90_U32x1_STSM_N>("x1", false);
    check_store<SM90_U32x2_STSM_N>("x2", false);
    check_store<SM90_U32x4_STSM_N>("x4", false);
    check_store<SM90_U16x2_STSM_T>("x1_trans", true);
    check_store<SM90_U16x4_STSM_T>("x2_trans", true);
    check_store<SM90_U16x8_STSM_T>("x4_trans", true);

    Tiles<device::Swizzle::none, device::Major::k>("none_k");
    Tiles<device::Swizzle::none, device::Major::mn>("none_mn");
    Tiles<device::Swizzle::bytes32, device::Major::k>("32_k");
    Tiles<device::Swizzle::bytes32, device::Major::mn>("32_mn");
    Tiles<device::Swizzle::bytes64, device::Major::k>("64_k");
    Tiles<device::Swizzle::bytes64, device::Major::mn>("64_mn");
    Tiles<device::Swizzle::bytes128, device::Major::k>("128_k");
    Tiles<device::Swizzle::bytes128, device::Major::mn>("128_mn");
}
