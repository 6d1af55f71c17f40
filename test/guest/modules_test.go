package guest

import (
	"strings"
	"testing"
)

func TestAModuleThatTheKernelLacksIsNamed(t *testing.T) {
	_, err := loadOrder(t.TempDir(), []string{"virtio_blk"})
	if err == nil || !strings.Contains(err.Error(), "virtio_blk") {
		t.Errorf("the error is %v", err)
	}
}
