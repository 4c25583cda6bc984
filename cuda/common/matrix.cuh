// Products on tensor cores by one warp, and the loads of their operands from shared memory.
//
// All 32 lanes take part. With g = lane / 4 and t = lane % 4, a lane's registers hold (PTX ISA, "Matrix fragments"):
//   m16n8k16, 16-bit   a[i], two neighbours:  row g + 8 (i % 2),  columns 2t + 8 (i / 2) and the next
//                      b[i], two neighbours:  rows 2t + 8 i and the next,  column g
//   m16n8k8, tf32      a[i]:                  row g + 8 (i % 2),  column t + 4 (i / 2)
//                      b[i]:                  row t + 4 i,  column g
//   both, float        d[i]:                  row g + 8 (i / 2),  column 2t + i % 2
// Of two neighbours, the lower half of the register holds the one of the lower row or column. Call check_a and check_b
// after loading a fragment: the emulator compares the fragment with this table.
#pragma once

#include "convert.cuh"

namespace gpu {

// d += a b, where A (16 x 16) and B (16 x 8) are of T, bf16 or fp16.
template <class T>
GPU_INLINE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2);
#if GPU_EMULATED
  emu::mma(std::is_same<T, bf16>::value ? emu::Mma::bf16 : emu::Mma::fp16, d, a, b);
#else
  if constexpr (std::is_same<T, bf16>::value)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d += a b, where A (16 x 8) and B (8 x 8) are of tf32, as to_tf32 returns it.
GPU_INLINE void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if GPU_EMULATED
  emu::mma(emu::Mma::tf32, d, a, b);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Loads kCount = 1, 2 or 4 matrices of 8 x 8 16-bit elements. Lane 8 m + j gives the address of row j of matrix m, a
// multiple of 16; lanes from 8 kCount on may give an arbitrary address. r[m] of lane l gets two elements of row l / 4
// of matrix m: element 2 (l % 4) and the next.
template <int kCount>
GPU_INLINE void ldmatrix(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#if GPU_EMULATED
  emu::ldmatrix(r, kCount, row, false);
#else
  if constexpr (kCount == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
#endif
}

// Loads matrices as ldmatrix does, each transposed: r[m] of lane l gets element l / 4 of two rows of matrix m, row
// 2 (l % 4) and the next.
template <int kCount>
GPU_INLINE void ldmatrix_trans(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#if GPU_EMULATED
  emu::ldmatrix(r, kCount, row, true);
#else
  if constexpr (kCount == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
#endif
}

// Checks that each lane's registers hold the elements of A that the table above gives. T is bf16, fp16, or float for
// tf32, rounded or not. element(row, column) points to an element of the 16 x 16 or 16 x 8 matrix, or is null if the
// element is zero. The emulator reports a wrong fragment at the caller's line; under nvcc check_a does nothing.
template <class T, class Element>
GPU_INLINE void check_a([[maybe_unused]] const uint32_t (&a)[4], [[maybe_unused]] const Element& element) {
#if GPU_EMULATED
  emu::check_fragment(emu::Operand::a, sizeof(T), a, &emu::call_element<Element>, &element);
#endif
}

// Checks a fragment of B, 16 x 8 or 8 x 8, as check_a checks one of A.
template <class T, class Element>
GPU_INLINE void check_b([[maybe_unused]] const uint32_t (&b)[2], [[maybe_unused]] const Element& element) {
#if GPU_EMULATED
  emu::check_fragment(emu::Operand::b, sizeof(T), b, &emu::call_element<Element>, &element);
#endif
}

}  // namespace gpu
