package sqlite

import "context"

// Pragma returns a setting of the writing connection.
func (s *Store) Pragma(ctx context.Context, name string) (value string, err error) {
	err = s.write.QueryRowContext(ctx, "PRAGMA "+name).Scan(&value)
	return value, err
}

// BlockSize is how many events a block of the index has.
const BlockSize = blockSize

// StopIndexer leaves the index as it is from now on.
func (s *Store) StopIndexer() { s.stopIndexer() }

// IndexAll puts everything into the index that belongs there.
func (s *Store) IndexAll(ctx context.Context) error {
	for {
		if pause, err := s.indexNext(ctx); err != nil || pause == 0 {
			return err
		}
	}
}

// IndexOne puts one block into the index.
func (s *Store) IndexOne(ctx context.Context) error {
	_, err := s.indexNext(ctx)
	return err
}

// LookAt has searches look at so many events in vain.
func (s *Store) LookAt(n int) { s.lookAt = n }
