// Complex numbers of float or double, laid out as torch's.
#pragma once

#include "portable.cuh"

namespace gpu {

template <class R>
struct alignas(2 * sizeof(R)) Complex {
  R re, im;
};

template <class R> GPU_INLINE Complex<R> conj(Complex<R> a) { return {a.re, -a.im}; }
template <class R> GPU_INLINE Complex<R> operator+(Complex<R> a, Complex<R> b) { return {a.re + b.re, a.im + b.im}; }
template <class R> GPU_INLINE Complex<R> operator-(Complex<R> a, Complex<R> b) { return {a.re - b.re, a.im - b.im}; }
template <class R> GPU_INLINE Complex<R> operator*(R a, Complex<R> b) { return {a * b.re, a * b.im}; }
template <class R> GPU_INLINE Complex<R> operator*(Complex<R> a, Complex<R> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
// a b + c
template <class R> GPU_INLINE Complex<R> fma(Complex<R> a, Complex<R> b, Complex<R> c) {
  return {a.re * b.re - a.im * b.im + c.re, a.re * b.im + a.im * b.re + c.im};
}
// Re(a b)
template <class R> GPU_INLINE R real_of_product(Complex<R> a, Complex<R> b) { return a.re * b.re - a.im * b.im; }

}  // namespace gpu
