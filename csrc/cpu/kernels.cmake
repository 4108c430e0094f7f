# add_kernels(target): the kernels, what chooses among them, and the threads that run them.
find_package(Threads REQUIRED)

function(add_kernels target)
  set(folder "${CMAKE_CURRENT_FUNCTION_LIST_DIR}")
  # Everything but the kernels is compiled without architecture flags: it runs before the processor is known.
  target_sources(${target} PRIVATE
    "${folder}/dispatch.cpp" "${folder}/pool.cpp" "${folder}/weight.cpp" "${folder}/isa_generic.cpp")

  # One source a kernel, compiled once for each instruction set.
  set(isas)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    set(isas avx2 avx512_vnni avx512_bf16)
    set(avx2 "-mavx2;-mfma;-mf16c")
    set(avx512_vnni "${avx2};-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni;-mprefer-vector-width=512")
    set(avx512_bf16 "${avx512_vnni};-mavx512bf16")
    target_compile_definitions(${target} PRIVATE PELTON_X86)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
    set(isas neon neon_i8mm)
    set(neon "-march=armv8.2-a+dotprod")
    set(neon_i8mm "-march=armv8.2-a+dotprod+i8mm")
    target_compile_definitions(${target} PRIVATE PELTON_ARM)
  endif()
  foreach(isa ${isas})
    target_sources(${target} PRIVATE "${folder}/isa_${isa}.cpp")
    set_source_files_properties("${folder}/isa_${isa}.cpp" PROPERTIES COMPILE_OPTIONS "${${isa}}")
  endforeach()

  target_compile_features(${target} PRIVATE cxx_std_20)
  # No contraction into fused multiply-adds on the compiler's own account: the kernels say where they want one.
  # GCC warns of "uninitialized" values inside its own AVX-512 headers (GCC bug 105593).
  target_compile_options(${target} PRIVATE -Wall -Wextra -O3 -ffp-contract=off
    $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi>)
  target_link_libraries(${target} PRIVATE Threads::Threads)
endfunction()
